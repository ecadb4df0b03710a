from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from training.training_samples import CATEGORICAL, NUMERIC, features, model, rows, training

from mlops_ray.errors import ArtifactError, TrainingError
from mlops_ray.features.matrix import FeatureMatrix
from mlops_ray.metadata import package as packages
from mlops_ray.training.dataset import TableColumns
from mlops_ray.training.fitting import pack, prepare
from mlops_ray.training.inference import Predictor
from mlops_ray.training.loop import build, train
from mlops_ray.training.models import TabularNet
from mlops_ray.training.splitting import split_rows
from mlops_ray.training.trainer import trained_from


class Untraceable(TabularNet):
    """TorchScript cannot compile this one."""

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        return super().forward(*[x_num, x_cat])


def make(folder: Path, target: str = "mlops_ray.training.models.TabularNet") -> packages.Package:
    settings = training(epochs=1)
    data = split_rows(rows(), settings.split, features().labels, None)
    prepared = prepare(
        data,
        features(),
        (NUMERIC, CATEGORICAL),
        settings,
        model(target),
        seed=1,
        drift_bins=10,
        folder=folder / "rows",
    )
    parts = [prepared.folder / name for name in ("train", "validation")]
    from mlops_ray.training.dataset import open_rows

    states = [state for _, state in train(prepared.settings, *(open_rows(part) for part in parts))]
    torch.use_deterministic_algorithms(False)
    trained = trained_from(states[-1])
    return packages.read(pack(prepared, trained, prepared.settings, folder / "package"))


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> packages.Package:
    return make(tmp_path_factory.mktemp("package"))


def test_scores_are_those_of_the_module_in_any_batch(package):
    predictor = Predictor(package)
    assert predictor.form == "torchscript"
    columns = TableColumns(rows(100, seed=9))
    together = predictor.predict(columns)
    module = build(package.manifest.model)
    module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in package.weights.items()})
    with torch.no_grad():
        encoded = (torch.from_numpy(part) for part in predictor._encoder.encode(columns))
        expected = torch.sigmoid(module.eval()(*encoded)).numpy()
    np.testing.assert_allclose(together, expected, atol=1e-6)
    for place in (0, 7, 99):
        row = {name: values[place : place + 1] for name, values in columns.items()}
        assert predictor.predict(row)[0] == pytest.approx(together[place], abs=1e-6)


@pytest.mark.parametrize("count", [1, 5, 5000])
def test_a_matrix_is_scored_like_its_columns(package, count):
    predictor = Predictor(package)
    table = TableColumns(rows(count, seed=count))
    spec = package.manifest.encoder
    wanted = predictor.predict({name: table[name] for name in spec.features})
    others = {"colour": table["colour"], "unread": np.zeros(count)}
    for names in (spec.numeric, spec.numeric[::-1], ("more", *spec.numeric)):
        values = [np.zeros(count) if name == "more" else table[name] for name in names]
        matrix = FeatureMatrix(names, np.column_stack(values), others)
        np.testing.assert_array_equal(predictor.predict(matrix), wanted)


def test_what_is_missing_is_named(package):
    predictor = Predictor(package)
    with pytest.raises(TrainingError, match="are missing"):
        predictor.predict({})
    for count in (2, 5000):
        lacking = dict(TableColumns(rows(count)))
        del lacking["colour"]
        with pytest.raises(TrainingError, match="colour"):
            predictor.predict(lacking)
        matrix = FeatureMatrix(("a",), np.zeros((count, 1)), {})
        with pytest.raises(TrainingError, match="are missing"):
            predictor.predict(matrix)


def test_a_model_that_cannot_be_compiled_runs_eagerly(tmp_path):
    target = f"{Untraceable.__module__}.Untraceable"
    predictor = Predictor(make(tmp_path, target))
    assert predictor.form == "eager"
    scores = predictor.predict(TableColumns(rows(10)))
    assert scores.shape == (10,)
    assert ((scores > 0) & (scores < 1)).all()


def test_unknown_categories_and_missing_numbers_still_get_a_score(package):
    scores = Predictor(package).predict(
        {
            "a": np.array([np.nan, np.inf]),
            "b": np.array([np.nan, -np.inf]),
            "constant": np.array([np.nan, 1e300]),
            "colour": np.array(["mauve", None], dtype=object),
        }
    )
    assert np.isfinite(scores).all()


def test_training_again_gives_the_same_digest(package, tmp_path):
    again = make(tmp_path)
    assert again.digest == package.digest
    assert again.weights_digest == package.weights_digest


def test_weights_of_another_architecture_are_refused(package):
    manifest = package.manifest
    wide = manifest.model.with_arguments(hidden_sizes=[17])
    from dataclasses import replace

    other = replace(package, manifest=manifest.model_copy(update={"model": wide}))
    with pytest.raises(TrainingError, match="weights do not fit"):
        Predictor(other)


@pytest.mark.parametrize("name", [packages.MANIFEST, packages.WEIGHTS, packages.REFERENCE])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_package_is_never_read(package, tmp_path, name, damage):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(package.path, folder)
    file = folder / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        place = content.rindex(b"1") if name != packages.WEIGHTS else len(content) - 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 3]) + content[place + 1 :])
    with pytest.raises(ArtifactError):
        packages.read(folder)
