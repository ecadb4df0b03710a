from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from serving import shop
from serving.harness import open_local

from mlops_ray.config import targets
from mlops_ray.config.serving import Graph, Serving
from mlops_ray.errors import MlopsRayError, ServingError
from mlops_ray.features.service import feature_columns
from mlops_ray.metadata import package
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.prediction_log.reading import read_predictions
from mlops_ray.serving.formats.answers import Answer, json_answer
from mlops_ray.serving.models.loading import ModelLoader, ModelSet
from mlops_ray.serving.models.served import Challenger, ModelSpec, ServedModels
from mlops_ray.training.inference import Predictor

ALIASES = ["champion", "first", "second"]
HERE = "serving.graphs"


def rows(count: int = 40, seed: int = 0) -> dict[str, Any]:
    numeric, categorical = feature_columns(shop.features(), "buys")
    random = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: random.normal(10, 60, count) for name in numeric}
    columns["amount"][::7] = np.nan
    choices = np.array(["none", "spring", "new", None], dtype=object)
    return columns | {name: random.choice(choices, count) for name in categorical}


def load(packages: list[Path], graph: Graph, versions: tuple[int, ...] = (1, 2, 3)) -> ModelSet:
    loader = ModelLoader(*feature_columns(shop.features(), "buys"), graph=graph)
    return loader.load(served(packages, versions), None)


def served(packages: list[Path], versions: tuple[int, ...]) -> ServedModels:
    specs = [
        ModelSpec(alias=alias, version=version, path=str(packages[version - 1]))
        for alias, version in zip(ALIASES, versions, strict=False)
    ]
    return ServedModels(answer=specs[0], shadows=tuple(specs[1:]))


@pytest.fixture(scope="module")
def single(packages: list[Path]) -> list[Predictor]:
    return [Predictor(package.read(path), fastest=True) for path in packages[:3]]


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_members_scores_are_averaged_by_weight_into_the_answer(packages, single):
    models = load(packages, Graph(members={"first": 2, "second": 0.5}))
    one, two, three = (predictor.predict(rows()) for predictor in single)
    close(models.answer.scorer.predict(rows()), (one + 2 * two + 0.5 * three) / 3.5)
    close(models.shadows[0].scorer.predict(rows()), two)
    close(models.shadows[1].scorer.predict(rows()), three)


def test_the_answering_alias_may_have_a_weight_of_its_own(packages, single):
    models = load(packages, Graph(members={"champion": 3, "first": 1}))
    one, two, _ = (predictor.predict(rows()) for predictor in single)
    close(models.answer.scorer.predict(rows()), 0.75 * one + 0.25 * two)


def test_functions_go_around_every_model_in_their_order(packages, single):
    before = (f"{HERE}.added", f"{HERE}.doubled")
    after = (f"{HERE}.halved", f"{HERE}.raised_by_amount")
    models = load(packages, Graph(before=before, after=after))
    columns = rows()
    given = {name: values.copy() for name, values in columns.items()}
    changed = columns | {"amount": (columns["amount"] + 1) * 2}
    for model, predictor in zip(models.all, single, strict=True):
        wanted = predictor.predict(changed) / 2
        wanted[changed["amount"] > 100] = 1.0
        close(model.scorer.predict(columns), wanted)
    for name, values in given.items():
        np.testing.assert_array_equal(columns[name], values)


def test_members_are_averaged_between_the_functions(packages, single):
    graph = Graph(before=(f"{HERE}.added",), members={"first": 1}, after=(f"{HERE}.halved",))
    columns = rows()
    changed = columns | {"amount": columns["amount"] + 1}
    one, two, _ = (predictor.predict(changed) for predictor in single)
    close(load(packages, graph).answer.scorer.predict(columns), (one + two) / 4)


def test_without_a_graph_the_models_are_the_packages_own(packages):
    models = load(packages, Graph())
    assert all(isinstance(model.scorer, Predictor) for model in models.all)


def test_the_same_package_under_two_aliases_stays_one_scorer(packages):
    models = load(packages, Graph(after=(f"{HERE}.halved",)), versions=(1, 1, 2))
    assert models.shadows[0].scorer is models.answer.scorer
    assert models.shadows[1].scorer is not models.answer.scorer


def test_challengers_have_the_functions_and_not_the_members(packages, single):
    specs = served(packages, (1, 2)).all
    routed = ServedModels(answer=specs[0], challengers=(Challenger(spec=specs[1], share=0.1),))
    graph = Graph(members={"first": 1}, after=(f"{HERE}.halved",))
    loader = ModelLoader(*feature_columns(shop.features(), "buys"), graph=graph)
    models = loader.load(routed, None)
    one, two, _ = (predictor.predict(rows()) for predictor in single)
    close(models.challengers[0].scorer.predict(rows()), two / 2)
    close(models.answer.scorer.predict(rows()), (one + two) / 4)


def test_a_member_that_is_not_served_is_refused_by_name(packages):
    with pytest.raises(ServingError, match="absent is a member") as caught:
        load(packages, Graph(members={"absent": 1}))
    assert "serving.graph.members" in str(caught.value)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"before": ("serving.graphs.shorter",)}, "gave no columns of 2 rows"),
        ({"before": ("serving.graphs.no_columns",)}, "gave no columns of 2 rows"),
        ({"after": ("serving.graphs.logits",)}, "scores between 0 and 1"),
        ({"after": ("serving.graphs.one_score",)}, "scores between 0 and 1"),
        ({"after": ("serving.graphs.picky",)}, "no amount"),
        ({"after": ("serving.graphs.right_for_one_row",)}, "gave no 2 scores"),
        ({"before": ("serving.graphs.in_place",)}, "read-only"),
        ({"after": ("serving.graphs.scores_in_place",)}, "read-only"),
        ({"after": ("serving.graphs.columns_in_place",)}, "read-only"),
    ],
)
def test_functions_that_do_not_fit_are_found_when_models_are_loaded(packages, graph, message):
    with pytest.raises(ServingError, match=message) as caught:
        load(packages, Graph(**graph))
    assert "serving.graph" in caught.value.where


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("serving.graphs.absent", "has no 'absent'"),
        ("serving.nowhere.f", "no module"),
        ("serving.graphs.NUMBER", "is no function"),
    ],
)
def test_functions_that_are_not_there_are_named(target, message):
    with pytest.raises(MlopsRayError, match=message):
        ModelLoader([], [], graph=Graph(after=(target,)))


def test_only_packages_on_the_allow_list_are_imported(monkeypatch):
    monkeypatch.setattr(targets, "_ALLOWED", ["mlops_ray"])
    with pytest.raises(MlopsRayError, match="not on the allow-list"):
        ModelLoader([], [], graph=Graph(before=("serving.graphs.doubled",)))


def test_scores_of_every_request_are_checked(packages):
    models = load(packages, Graph(after=(f"{HERE}.whole_scores_above_a_hundred",)))
    columns = rows(2)
    columns["amount"] = np.array([1.0, 2.0])
    assert models.answer.scorer.predict(columns).shape == (2,)
    columns["amount"][1] = 101.0
    with pytest.raises(ServingError, match="gave no 2 scores"):
        models.answer.scorer.predict(columns)


def test_an_ensemble_is_explained_as_what_it_answers(packages):
    graph = Graph(before=(f"{HERE}.added",), members={"first": 1}, after=(f"{HERE}.halved",))
    answer = load(packages, graph).answer
    explained = answer.explain(rows(4))
    np.testing.assert_array_equal(explained.scores, answer.scorer.predict(rows(4)))
    total = explained.base + sum(explained.contributions.values())
    logit = np.log(explained.scores) - np.log1p(-explained.scores)
    np.testing.assert_allclose(total, logit, rtol=0, atol=1e-9)
    numeric, categorical = feature_columns(shop.features(), "buys")
    assert set(explained.contributions) == {*numeric, *categorical}


def test_members_in_other_processes_score_at_the_same_time(packages, single):
    from mlops_ray.serving.models.graph import AsyncGraphScorer, GraphFunctions

    begun: list[str] = []

    class Far:
        def __init__(self, name: str, score: float) -> None:
            self.name, self.score = name, score

        def predict(self, columns: Any) -> Any:
            return np.full(len(columns["amount"]), self.score)

        async def apredict(self, columns: Any) -> Any:
            begun.append(self.name)
            while len(begun) < 2:
                await asyncio.sleep(0)
            return self.predict(columns)

    members: list[Any] = [(Far("a", 0.2), 1.0), (single[0], 1.0), (Far("b", 0.4), 2.0)]
    scorer = AsyncGraphScorer(GraphFunctions(Graph(after=(f"{HERE}.halved",))), members)
    wanted = (0.2 + single[0].predict(rows()) + 0.8) / 8
    close(asyncio.run(asyncio.wait_for(scorer.apredict(rows()), 10)), wanted)
    close(scorer.predict(rows()), wanted)


def test_scores_are_contiguous_whatever_a_function_gives(packages, single):
    answer = load(packages, Graph(after=(f"{HERE}.strided",))).answer
    for found in (answer.scorer.predict(rows(3)), answer.explain(rows(3)).scores):
        close(found, single[0].predict(rows(3)))
        written = Answer("shop", 1, "champion", ["a", "b", "c"], found, [0, 0, 0])
        assert len(orjson.loads(json_answer(written))["scores"]) == 3


def test_models_may_read_what_a_function_makes(tmp_path):
    path = shop.write_package(tmp_path / "m", 5, extra=("moon_phase",))
    served_ = ServedModels(answer=ModelSpec(alias="champion", version=1, path=str(path)))
    names = feature_columns(shop.features(), "buys")
    answer = ModelLoader(*names, graph=Graph(before=(f"{HERE}.made",))).load(served_, None).answer
    wanted = Predictor(package.read(path)).predict(rows(4) | {"moon_phase": np.ones(4)})
    close(answer.scorer.predict(rows(4)), wanted)
    explained = answer.explain(rows(4))
    close(explained.scores, wanted)
    assert set(explained.contributions) == {*names[0], *names[1]}
    for graph in (
        Graph(),
        Graph(before=(f"{HERE}.doubled",)),
        Graph(before=(f"{HERE}.made_text",)),
    ):
        with pytest.raises(ServingError, match="moon_phase"):
            ModelLoader(*names, graph=graph).load(served_, None)


def test_an_endpoint_answers_and_logs_what_reads_a_made_feature(shop_home, tmp_path):
    path = shop.write_package(tmp_path / "m", 5, extra=("moon_phase",))
    home, serving = Home(tmp_path / "log"), Serving(graph=Graph(before=(f"{HERE}.made",)))
    local = open_local(shop_home, [path], home, serving)

    async def story() -> None:
        await local.endpoint.reconfigure(local.config(1))
        body = orjson.dumps({"rows": [shop.ROW], "ids": ["a"]})
        for action in ("predict", "explain"):
            status, _, content = await local.send("POST", f"/v1/models/shop/{action}", body, {})
            assert status == 200, content
        await local.endpoint.flush()

    asyncio.run(story())
    logged = read_predictions(home.predictions("shop")).to_pylist()
    assert [row["id"] for row in logged] == ["a"]
    assert "moon_phase" not in logged[0]["features"]
