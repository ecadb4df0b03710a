"""Who scores, what is kept of it, and what happens where something is gone; without a cluster."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import shop
from serving.harness import LocalShop, open_local, same

from mlops_ray.config.serving import Serving
from mlops_ray.errors import ServingError
from mlops_ray.features.matrix import take
from mlops_ray.features.online.failures import Fallback, ServerGoneError
from mlops_ray.metadata.home import Home
from mlops_ray.serving.log.encoding import Answered
from mlops_ray.serving.models.scorer import ModelGoneError

PREDICT = "/v1/models/shop/predict"
EXPLAIN = "/v1/models/shop/explain"
BODY = {"rows": [shop.ROW]}

Opened = Callable[..., Awaitable[LocalShop]]


@pytest.fixture
def opened(shop_home: Home, packages: list[Path], tmp_path: Path) -> Iterator[Opened]:
    """Opens the shop with a champion and a canary."""

    async def open_with(share: float = 0.5, **more: Any) -> LocalShop:
        serving = Serving.model_validate(more)
        local = open_local(shop_home, packages, Home(tmp_path / "log"), serving)
        config = local.config(1)
        canary = {"alias": "canary", "version": 2, "path": str(packages[1])}
        config["challengers"] = [{"spec": canary, "share": share}]
        await local.endpoint.reconfigure(config)
        return local

    logging.disable(logging.CRITICAL)
    yield open_with
    logging.disable(logging.NOTSET)


class Far:
    """A model in another process; ``failure`` is what comes instead of scores."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.calls: list[int] = []
        self.failure: Exception | None = None

    def predict(self, columns: Any) -> Any:
        raise AssertionError("this would block the event loop")

    async def apredict(self, columns: Any) -> Any:
        scores = self.real.predict(columns)
        self.calls.append(len(scores))
        await asyncio.sleep(0.01)
        if self.failure is not None:
            raise self.failure
        return scores


class Near:
    """A model in this process that notes its threads and waits at a gate."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.calls: list[int] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def predict(self, columns: Any) -> Any:
        scores = self.real.predict(columns)
        self.calls.append(len(scores))
        self.threads.add(threading.current_thread().name)
        self.gate.wait(10)
        return scores


def put(local: LocalShop, alias: str, kind: Any) -> Any:
    """Put a scorer around that of an alias."""
    models: Any = local.endpoint.models.now
    model = next(model for model in models.all if model.spec.alias == alias)
    scorer = kind(model.scorer)
    object.__setattr__(model, "scorer", scorer)
    model.__dict__.pop("remote", None)
    return scorer


def spy(local: LocalShop) -> list[Any]:
    """Keep what the log is told of each model's rows, beside the log."""
    kept: list[Any] = []
    add = local.endpoint.log.add

    def note(answered: Answered) -> Any:
        for model, rows, _ in answered.parts:
            places = np.arange(len(answered.ids)) if rows is None else rows
            kept.append(
                SimpleNamespace(
                    model=model,
                    ids=[answered.ids[place] for place in places],
                    scores=answered.scores[places],
                    inputs=take(answered.inputs, places),
                    columns=take(answered.columns, places),
                )
            )
        return add(answered)

    local.endpoint.log.add = note  # type: ignore[method-assign]
    return kept


def test_a_placed_canary_leaves_the_local_champion_its_batches(opened: Opened) -> None:
    async def test() -> None:
        local = await opened(routing={"sticky_by": ["customer"]})
        rows = [{**shop.ROW, "customer": f"c{n}"} for n in range(30)]
        expected = (await local.call("POST", PREDICT, {"rows": rows}))[1]
        near, far = put(local, "champion", Near), put(local, "canary", Far)
        local.endpoint.scoring.batcher.expect(1.0)
        kept = spy(local)
        near.gate.clear()
        calls = [
            asyncio.ensure_future(local.call("POST", PREDICT, {"rows": [row], "ids": [f"i{n}"]}))
            for n, row in enumerate(rows)
        ]
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert (await local.call("GET", "/healthz"))[0] == 200, "the event loop turns meanwhile"
        assert not any(call.done() for call in calls)
        near.gate.set()
        answers = [content for _, content in await asyncio.gather(*calls)]
        champions = expected["versions"].count(1)
        assert near.calls == [champions]
        assert all(name.startswith("batch") for name in near.threads)
        assert far.calls == [1] * (30 - champions)
        assert [answer["version"] for answer in answers] == expected["versions"]
        assert same([answer["scores"][0] for answer in answers], expected["scores"])
        logged = {i: float(s) for a in kept for i, s in zip(a.ids, a.scores, strict=True)}
        assert len(logged) == sum(len(a.ids) for a in kept) == 30
        assert same([logged[f"i{n}"] for n in range(30)], expected["scores"])
        for answered in kept:
            assert {len(column) for column in answered.columns.values()} == {len(answered.ids)}

    asyncio.run(test())


def test_one_request_whose_rows_are_near_and_far(opened: Opened) -> None:
    async def test() -> None:
        local = await opened(routing={"sticky_by": ["customer"]})
        rows = [{**shop.ROW, "customer": f"c{n}"} for n in range(30)]
        expected = (await local.call("POST", PREDICT, {"rows": rows}))[1]
        put(local, "canary", Far)
        kept = spy(local)
        content = (await local.call("POST", PREDICT, {"rows": rows}))[1]
        assert content["versions"] == expected["versions"]
        assert same(content["scores"], expected["scores"])
        assert {a.model.spec.version: a.ids for a in kept} == {
            wanted: [
                i for i, v in zip(content["ids"], content["versions"], strict=True) if v == wanted
            ]
            for wanted in (1, 2)
        }

    asyncio.run(test())


def test_a_process_that_is_gone_is_no_fault_of_the_request(opened: Opened) -> None:
    async def test() -> None:
        local = await opened(1.0)
        far = put(local, "canary", Far)
        kept = spy(local)
        far.failure = ModelGoneError("it has ended", where="/secret/place")
        status, headers, content = await local.send("POST", PREDICT, BODY)
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"secret" not in content
        far.failure = ServingError("the model did not score", where="/secret/place")
        assert (await local.call("POST", PREDICT, BODY))[0] == 500
        assert kept == []
        far.failure = None
        assert (await local.call("POST", PREDICT, BODY))[0] == 200
        assert len(kept) == 1

    asyncio.run(test())


def test_unlogged_requests_share_batches_and_stay_out_of_the_log(opened: Opened) -> None:
    async def test() -> None:
        local = await opened(0.0)
        near, kept = put(local, "champion", Near), spy(local)
        off = {"x-mlops-ray-log": "off"}
        rows = [{**shop.ROW, "amount": float(n)} for n in range(6)]
        calls = [
            local.call("POST", PREDICT, {"rows": [row], "ids": [f"i{n}"]}, off if n % 2 else {})
            for n, row in enumerate(rows)
        ]
        answers = [content for _, content in await asyncio.gather(*calls)]
        assert near.calls == [6]
        assert [i for a in kept for i in a.ids] == ["i0", "i2", "i4"]
        assert same(kept[0].scores, [answers[n]["scores"][0] for n in (0, 2, 4)])
        assert kept[0].inputs["amount"].tolist() == [0.0, 2.0, 4.0]
        assert {len(column) for column in kept[0].columns.values()} == {3}

    asyncio.run(test())


def test_who_was_told_that_time_is_up_is_not_in_the_log(opened: Opened) -> None:
    async def test() -> None:
        local = await opened(0.0)
        near, kept = put(local, "champion", Near), spy(local)
        local.endpoint.scoring.batcher.expect(1.0)
        near.gate.clear()
        late = local.call(
            "POST", PREDICT, {**BODY, "ids": ["late"]}, {"x-request-timeout-ms": "50"}
        )
        patient = asyncio.ensure_future(local.call("POST", PREDICT, {**BODY, "ids": ["patient"]}))
        assert (await late)[0] == 504
        near.gate.set()
        assert (await patient)[0] == 200
        assert sum(near.calls) == 2
        assert [i for a in kept for i in a.ids] == ["patient"]

    asyncio.run(test())


class Explaining:
    """Explains nothing, until its gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def explain(self, columns: Any) -> Any:
        self.gate.wait(10)
        raise ZeroDivisionError


def test_explanations_leave_turns_to_predictions(opened: Opened) -> None:
    async def test() -> None:
        local = await opened(0.0, max_ongoing_requests=4, max_queued_requests=4)
        explaining = Explaining()
        models: Any = local.endpoint.models.now
        models.answer.__dict__["_explainer"] = explaining
        calls = [asyncio.ensure_future(local.send("POST", EXPLAIN, BODY)) for _ in range(8)]
        await asyncio.sleep(0.05)
        for _ in range(3):
            assert (await local.call("POST", PREDICT, BODY))[0] == 200
        explaining.gate.set()
        found = [(status, headers.get("retry-after")) for status, headers, _ in
                 await asyncio.gather(*calls)]  # fmt: skip
        assert sorted(found) == [(500, None)] * 2 + [(503, "1")] * 6

    asyncio.run(test())


class Unreachable:
    """A look-up whose store is asked in vain; notes in which threads it was."""

    def __init__(self, real: Any) -> None:
        self.real, self.keys, self.reads = real, real.keys, real.reads
        self.fallback = Fallback("missing", 1, silent_s=0.0)
        self.threads: list[str] = []

    @property
    def degraded(self) -> str:
        return self.fallback.degraded

    @property
    def is_gone(self) -> bool:
        return self.fallback.is_gone

    def __call__(self, inputs: Any) -> Any:
        self.fallback.read([[b"key"]], self.fetch)
        return self.real(inputs)

    def fetch(self) -> Any:
        self.threads.append(threading.current_thread().name)
        raise ServerGoneError("it does not answer")


def test_a_store_that_is_gone_is_asked_again_in_a_thread(opened: Opened) -> None:
    async def test() -> None:
        local = await opened(0.0)
        lookup: Any = Unreachable(local.endpoint.scoring._lookup)
        local.endpoint.scoring._lookup = lookup
        for _ in range(4):
            assert (await local.call("POST", PREDICT, BODY))[0] == 200
        assert (await local.call("POST", EXPLAIN, BODY))[0] == 200
        assert lookup.threads[0] == threading.main_thread().name
        names = [name.partition("_")[0] for name in lookup.threads[1:]]
        assert names == ["batch", "batch", "batch", "explain"]

    asyncio.run(test())


def test_scores_of_a_batch_that_are_no_numbers_fail_where_they_are(opened: Opened) -> None:
    class Odd(Near):
        def predict(self, columns: Any) -> Any:
            scores = super().predict(columns)
            return np.where(columns["amount"] == 13, np.nan, scores)

    async def test() -> None:
        local = await opened(0.0)
        put(local, "champion", Odd)
        calls = [
            local.call("POST", PREDICT, {"rows": [{**shop.ROW, "amount": float(n)}]})
            for n in range(11, 16)
        ]
        found = [status for status, _ in await asyncio.gather(*calls)]
        assert found == [200, 200, 500, 200, 200]

    asyncio.run(test())
