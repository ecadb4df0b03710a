from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import shop

from mlops_ray.errors import ServingError
from mlops_ray.features.service import feature_columns
from mlops_ray.serving.models.loading import ModelLoader
from mlops_ray.serving.models.served import Challenger, ModelSpec, ServedModels


@pytest.fixture(scope="module")
def loader() -> ModelLoader:
    return ModelLoader(*feature_columns(shop.features(), "buys"))


def spec(packages: list[Path], version: int, alias: str = "champion") -> ModelSpec:
    return ModelSpec(alias=alias, version=version, path=str(packages[version - 1]))


def rows(count: int) -> dict[str, Any]:
    numeric, categorical = feature_columns(shop.features(), "buys")
    random = np.random.default_rng(0)
    columns: dict[str, Any] = {name: random.normal(10, 60, count) for name in numeric}
    return columns | {name: np.array(["none"] * count, dtype=object) for name in categorical}


def test_what_was_loaded_says_what_it_is(loader, packages):
    models = loader.load(ServedModels(answer=spec(packages, 2)), None)
    answer = models.answer
    assert (answer.spec.version, answer.service, answer.remote) == (2, "buys", False)
    assert models.forms == {"champion": answer.form}
    assert answer.form in ("eager", "torchscript", "onnx")
    assert answer.reference.digest == answer.reference_digest
    numeric, categorical = feature_columns(shop.features(), "buys")
    assert set(answer.features) == set(answer.baseline) == {*numeric, *categorical}


def test_a_package_that_is_held_is_not_loaded_again(loader, packages):
    first = loader.load(ServedModels(answer=spec(packages, 1)), None)
    routed = ServedModels(
        answer=spec(packages, 2),
        challengers=(Challenger(spec=spec(packages, 1, "challenger"), share=0.2),),
        shadows=(spec(packages, 2, "shadow"),),
        epoch=5,
    )
    second = loader.load(routed, first)
    assert second.challengers[0].scorer is first.answer.scorer
    assert second.shadows[0].scorer is second.answer.scorer
    assert second.versions == {"champion": 2, "challenger": 1, "shadow": 2}
    assert [m.spec for m in second.all] == list(routed.all)


def test_models_that_are_served_no_more_are_let_go(loader, packages):
    first = loader.load(ServedModels(answer=spec(packages, 1)), None)
    scorer = weakref.ref(first.answer.scorer)
    first = loader.load(ServedModels(answer=spec(packages, 2)), first)
    gc.collect()
    assert scorer() is None
    assert first.answer.spec.version == 2


@pytest.mark.parametrize(
    ("version", "message"), [(4, "no readable model package"), (5, "moon_phase")]
)
def test_a_package_that_cannot_be_served_is_named_and_the_held_ones_stay(
    loader, packages, version, message
):
    held = loader.load(ServedModels(answer=spec(packages, 1)), None)
    before = held.answer.scorer.predict(rows(3))
    with pytest.raises(ServingError, match=message) as caught:
        loader.load(ServedModels(answer=spec(packages, version)), held)
    assert f"version {version} (champion)" in str(caught.value)
    np.testing.assert_array_equal(held.answer.scorer.predict(rows(3)), before)


def test_a_package_whose_files_are_gone_is_refused(loader, packages, tmp_path):
    gone = ModelSpec(alias="champion", version=9, path=str(tmp_path / "gone"))
    with pytest.raises(ServingError, match="is not there"):
        loader.load(ServedModels(answer=gone), None)


def test_explanations_are_of_the_answering_version(loader, packages):
    models = loader.load(ServedModels(answer=spec(packages, 3)), None)
    explained = models.answer.explain(rows(2))
    np.testing.assert_array_equal(explained.scores, models.answer.scorer.predict(rows(2)))
