from __future__ import annotations

import asyncio
import concurrent.futures
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError, RayTaskError
from serving import shop
from serving.harness import free_port

from mlops_ray.config.serving import Serving
from mlops_ray.errors import ArtifactError, ServingError
from mlops_ray.features.service import feature_columns
from mlops_ray.metadata import package
from mlops_ray.serving.deployment import runtime
from mlops_ray.serving.models import remote
from mlops_ray.serving.models.loading import ModelLoader
from mlops_ray.serving.models.remote import ModelServer, RemoteScorer
from mlops_ray.serving.models.scorer import ModelGoneError
from mlops_ray.serving.models.served import ModelSpec, ServedModels
from mlops_ray.training.inference import Predictor


class Model:
    """Scores x/100 plus its number; waits at its gate; negative numbers are poison."""

    def __init__(self, number: float = 0.0) -> None:
        self.number = number
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []

    def predict(self, columns: Any) -> Any:
        self.gate.wait(10)
        values = columns["x"]
        self.batches.append(len(values))
        if (values < 0).any():
            raise ValueError("poison")
        return values / 100 + self.number


class Shelf:
    """Loads models by path and counts."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.loads: list[str] = []

    def load(self, path: str) -> Model:
        self.loads.append(path)
        if path == "broken":
            raise ArtifactError("this folder is no readable model package", where=path)
        return self.models.setdefault(path, Model(float(path)))


def x(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, dtype=np.float64)}


def test_calls_that_are_there_at_once_are_scored_together():
    async def story() -> None:
        shelf = Shelf()
        server = ModelServer(load=shelf.load)
        await server.score("0", x(1))
        model = shelf.models["0"]
        model.batches.clear()
        model.gate.clear()
        first = asyncio.create_task(server.score("0", x(7)))
        await asyncio.sleep(0.05)
        calls = [asyncio.create_task(server.score("0", x(n, n + 0.5))) for n in range(20)]
        await asyncio.sleep(0.05)
        model.gate.set()
        await first
        found = await asyncio.gather(*calls)
        for n, scores in enumerate(found):
            np.testing.assert_allclose(scores, [n / 100, (n + 0.5) / 100])
        assert model.batches == [1, 40]

    asyncio.run(story())


class Broken:
    """A handle whose calls fail."""

    is_initialized = True

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.score = self

    def remote(self, path: str, columns: Any) -> Any:
        return self

    def result(self, timeout_s: float) -> Any:
        raise self.error

    def __await__(self) -> Any:
        raise self.error
        yield


def test_a_process_that_is_gone_is_told_from_a_model_that_fails():
    raised = RayTaskError("score", "traceback", ValueError("poison"))
    cases = [
        (raised, False),
        (raised.as_instanceof_cause(), False),
        (RayActorError(), True),
        (TimeoutError(), True),
    ]
    for error, is_gone in cases:
        scorer = RemoteScorer(Broken(error), "path", ["x"])
        for call in (scorer.predict, lambda columns, s=scorer: asyncio.run(s.apredict(columns))):
            with pytest.raises(ServingError) as caught:
                call(x(1))
            assert isinstance(caught.value, ModelGoneError) is is_gone


def test_a_batch_has_a_bound(monkeypatch):
    monkeypatch.setattr(remote, "MERGED_ROWS", 10)

    async def story() -> None:
        shelf = Shelf()
        server = ModelServer(load=shelf.load)
        sizes = [3, 3, 3, 3, 25, 1, 1]
        calls = [server.score("0", x(*range(size))) for size in sizes]
        found = await asyncio.gather(*calls)
        assert [len(scores) for scores in found] == sizes
        batches = shelf.models["0"].batches
        assert sum(batches) == sum(sizes)
        assert max(batch for batch in batches if batch != 25) <= 10

    asyncio.run(story())


def test_a_poisonous_call_fails_alone():
    async def story() -> None:
        shelf = Shelf()
        server = ModelServer(load=shelf.load)
        calls = [server.score("0", x(n)) for n in (1, 2, -3, 4)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in found] == [
            np.ndarray,
            np.ndarray,
            ValueError,
            np.ndarray,
        ]
        np.testing.assert_allclose(
            np.concatenate([found[0], found[1], found[3]]), [0.01, 0.02, 0.04]
        )
        np.testing.assert_allclose(await server.score("0", x(5)), [0.05])

    asyncio.run(story())


def test_a_call_that_is_given_up_leaves_the_others_their_scores():
    async def story() -> None:
        shelf = Shelf()
        server = ModelServer(load=shelf.load)
        await server.score("0", x(1))
        shelf.models["0"].gate.clear()
        calls = [asyncio.create_task(server.score("0", x(n))) for n in range(5)]
        await asyncio.sleep(0.05)
        calls[0].cancel()
        calls[2].cancel()
        shelf.models["0"].gate.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [float(found[n][0]) for n in (1, 3, 4)] == pytest.approx([0.01, 0.03, 0.04])

    asyncio.run(story())


def test_a_package_is_loaded_once_and_the_two_used_last_are_held():
    async def story() -> None:
        shelf = Shelf()
        server = ModelServer(load=shelf.load)
        await asyncio.gather(*(server.score("1", x(0)) for _ in range(9)))
        await server.reconfigure({"paths": ["2"]})
        assert shelf.loads == ["1", "2"]
        assert (await server.score("2", x(0)))[0] == 2
        assert (await server.score("1", x(0)))[0] == 1
        assert shelf.loads == ["1", "2"]
        await server.score("3", x(0))
        await server.score("1", x(0))
        assert shelf.loads == ["1", "2", "3"]
        await server.score("2", x(0))
        assert shelf.loads == ["1", "2", "3", "2"]

    asyncio.run(story())


def test_a_broken_package_fails_those_who_ask_and_nobody_else():
    async def story() -> None:
        shelf, now_s = Shelf(), [100.0]
        server = ModelServer(load=shelf.load, clock_s=lambda: now_s[0])
        await server.reconfigure({"paths": ["1", "2"]})
        await server.reconfigure({"paths": ["broken"]})
        for _ in range(5):
            with pytest.raises(ArtifactError):
                await server.score("broken", x(0))
        assert (await server.score("1", x(0)))[0] == 1
        assert (await server.score("2", x(0)))[0] == 2
        assert shelf.loads == ["1", "2", "broken"]
        now_s[0] += remote.REFUSED_S
        with pytest.raises(ArtifactError):
            await server.score("broken", x(0))
        assert shelf.loads == ["1", "2", "broken", "broken"]
        now_s[0] += remote.REFUSED_S
        server._load = lambda path: Model(4.0)
        assert (await server.score("broken", x(0)))[0] == 4

    asyncio.run(story())


class Handle:
    """What a Serve handle does, over a server in an event loop of another thread."""

    is_initialized = True

    def __init__(self, server: ModelServer) -> None:
        self.server = server
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.sent: list[int] = []

    @property
    def score(self) -> Handle:
        return self

    def remote(self, path: str, columns: Any) -> Any:
        copied = pickle.loads(pickle.dumps((path, columns)))
        self.sent.append(len(copied[1]))
        return Response(asyncio.run_coroutine_threadsafe(self.server.score(*copied), self.loop))


class Response:
    def __init__(self, future: Any) -> None:
        self.future = future

    def result(self, timeout_s: float) -> Any:
        return self.future.result(timeout_s)

    def __await__(self) -> Any:
        return asyncio.wrap_future(self.future).__await__()


def columns(count: int) -> dict[str, Any]:
    numeric, categorical = feature_columns(shop.features(), "buys")
    random = np.random.default_rng(0)
    found: dict[str, Any] = {name: random.normal(10, 60, count) for name in numeric}
    choices = np.array(["none", None], dtype=object)
    return found | {name: random.choice(choices, count) for name in categorical}


def test_an_alias_with_processes_of_its_own_answers_like_one_without(packages: list[Path]):
    handle = Handle(ModelServer())
    names = feature_columns(shop.features(), "buys")
    loader = ModelLoader(*names, remotes={"champion": handle})
    specs = [
        ModelSpec(alias=alias, version=version, path=str(packages[version - 1]))
        for alias, version in (("champion", 1), ("near", 1), ("second", 2))
    ]
    models = loader.load(ServedModels(answer=specs[0], shadows=tuple(specs[1:])), None)
    assert models.forms["champion"] == "remote"
    assert models.answer.remote
    assert not models.shadows[0].remote
    wanted = Predictor(package.read(packages[0])).predict(columns(9))
    found = asyncio.run(models.answer.scorer.apredict(columns(9)))  # type: ignore[attr-defined]
    for scores in (found, models.answer.scorer.predict(columns(9))):
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(models.shadows[0].scorer.predict(columns(9)), wanted, atol=1e-6)
    explained = models.answer.explain(columns(9))
    np.testing.assert_allclose(explained.scores, wanted, rtol=0, atol=1e-6)


def test_a_broken_package_in_another_process_is_refused_when_it_is_loaded(packages: list[Path]):
    def load(path: str) -> Any:
        raise ArtifactError("its disk is gone")

    handle = Handle(ModelServer(load=load))
    loader = ModelLoader(*feature_columns(shop.features(), "buys"), remotes={"champion": handle})
    spec = ModelSpec(alias="champion", version=1, path=str(packages[0]))
    with pytest.raises(ServingError, match="its disk is gone"):
        loader.load(ServedModels(answer=spec), None)


def test_only_the_models_features_travel(packages: list[Path]):
    handle = Handle(ModelServer(load=lambda path: Model()))
    scorer = RemoteScorer(handle, "0", ["x"])
    scorer.predict(x(1) | {"y": np.zeros(1), "z": np.zeros(1)})
    assert handle.sent == [1]


def test_a_model_of_a_real_deployment_answers_threads_and_event_loops(
    ray_cluster: Any, packages: list[Path]
):
    from ray import serve

    found = runtime.running()
    runtime.start(Serving(port=found[0] if found else free_port()))
    app: Any = serve.deployment(num_replicas=1, max_ongoing_requests=1000)(ModelServer)
    handle = serve.run(app.bind(), name="models", route_prefix=None)
    try:
        read = package.read(packages[0])
        scorer = RemoteScorer(handle, str(packages[0]), read.manifest.encoder.features)
        wanted = Predictor(read).predict(columns(9))
        np.testing.assert_allclose(scorer.predict(columns(9)), wanted, rtol=0, atol=1e-6)

        async def together() -> list[Any]:
            return await asyncio.gather(*(scorer.apredict(columns(9)) for _ in range(50)))

        for scores in asyncio.run(together()):
            np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6)
        broken = RemoteScorer(handle, str(packages[3]), read.manifest.encoder.features)
        with pytest.raises(ServingError, match="no readable model package"):
            broken.predict(columns(1))
    finally:
        serve.delete("models")


class Short(Model):
    """Scores all rows but the last."""

    def predict(self, columns: Any) -> Any:
        return super().predict(columns)[:-1]


def test_scores_of_another_number_of_rows_are_refused():
    async def story() -> None:
        server = ModelServer(load=lambda path: Short())
        calls = [server.score("0", x(n, n)) for n in (1, 2, 3)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in found] == [ValueError] * 3

    asyncio.run(story())

    class Silent(Handle):
        def remote(self, path: str, columns: Any) -> Any:
            done: Any = concurrent.futures.Future()
            done.set_result(np.array([0.5]))
            return Response(done)

    scorer = RemoteScorer(Silent(ModelServer()), "0", ["x"])
    with pytest.raises(ServingError, match="for 2 rows"):
        scorer.predict(x(1, 2))
