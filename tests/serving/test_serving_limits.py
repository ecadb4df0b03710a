"""What a replica takes at once, and how long it works on it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import shop
from serving.harness import LocalShop, open_local

from mlops_ray.config.serving import Serving
from mlops_ray.errors import RequestError, ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint.limits import Limits, timeout_of

PREDICT = "/v1/models/shop/predict"
BODY = {"rows": [shop.ROW]}


def serving(**more: Any) -> Serving:
    return Serving.model_validate(more)


@pytest.fixture
def opened(
    shop_home: Home, packages: list[Path], tmp_path: Path
) -> Callable[..., Awaitable[LocalShop]]:
    async def open_with(**more: Any) -> LocalShop:
        local = open_local(shop_home, packages, Home(tmp_path / "log"), serving(**more))
        await local.endpoint.reconfigure(local.config(1))
        return local

    return open_with


class Slow:
    """A model that waits for a gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls = 0

    def predict(self, columns: Any) -> Any:
        self.calls += 1
        self.gate.wait(20)
        return np.full(len(columns["hour"]), 0.5)


def make_slow(local: LocalShop) -> Slow:
    slow = Slow()
    models: Any = local.endpoint.models.now
    object.__setattr__(models.answer, "scorer", slow)
    local.endpoint.scoring.batcher.expect(1.0)
    return slow


def test_turns_are_counted_and_given_back() -> None:
    limits = Limits(serving(max_ongoing_requests=2, max_queued_requests=1, retry_after="3s"))

    async def enter_all() -> None:
        turns = [limits.turn() for _ in range(3)]
        for turn in turns:
            await turn.__aenter__()
        with pytest.raises(RequestError) as caught:
            async with limits.turn():
                pass
        assert (caught.value.status, caught.value.retry_after_s) == (503, 3)
        assert limits.in_flight == 3
        for turn in turns:
            await turn.__aexit__(None, None, None)
        with pytest.raises(KeyError):
            async with limits.turn():
                raise KeyError
        assert limits.in_flight == 0

    asyncio.run(enter_all())


def test_time_is_up() -> None:
    limits = Limits(serving(timeout="20s"))

    async def wait(timeout_ms: int | None) -> float:
        async with limits.turn(timeout_ms) as deadline_s:
            left_s = deadline_s - asyncio.get_running_loop().time()
            if timeout_ms is not None and timeout_ms < 1000:
                await asyncio.sleep(30)
            return left_s

    assert asyncio.run(wait(None)) == pytest.approx(20, abs=1)
    assert asyncio.run(wait(5000)) == pytest.approx(5, abs=1)
    assert asyncio.run(wait(10**9)) == pytest.approx(20, abs=1), "a client may shorten it only"
    with pytest.raises(RequestError) as caught:
        asyncio.run(wait(10))
    assert caught.value.status == 504


def test_who_cancels_from_outside_is_obeyed() -> None:
    limits = Limits(serving())

    async def cancelled() -> None:
        async def wait() -> None:
            async with limits.turn(5000):
                await asyncio.sleep(30)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert limits.in_flight == 0

    asyncio.run(cancelled())


@pytest.mark.parametrize("header", [b"0", b"-1", b"1.5", b"", b"soon", b"9" * 40, "١".encode()])
def test_a_strange_timeout_is_refused(header: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        timeout_of(header)
    assert caught.value.status == 400


def test_a_model_that_does_not_come_back_stops_only_predictions(opened: Any) -> None:
    async def serve() -> None:
        local = await opened(max_ongoing_requests=2, max_queued_requests=1)
        slow = make_slow(local)
        logging.disable(logging.CRITICAL)
        waiting = [
            asyncio.create_task(local.call("POST", PREDICT, BODY, {"x-request-timeout-ms": "300"}))
            for _ in range(3)
        ]
        await asyncio.sleep(0.05)
        assert (await local.call("GET", "/healthz"))[0] == 200
        status, headers, _ = await local.send("POST", PREDICT, BODY)
        assert (status, headers["retry-after"]) == (503, "1")
        found = await asyncio.gather(*waiting)
        assert [status for status, _ in found] == [504] * 3
        assert local.endpoint.limits.in_flight == 0
        local.endpoint.check()
        busy = local.endpoint.scoring.batcher
        busy._busy_since_s -= 100
        with pytest.raises(ServingError, match="does not come back"):
            local.endpoint.check()
        slow.gate.set()
        status, content = await local.call("POST", PREDICT, BODY)
        assert (status, content["scores"]) == (200, [0.5])
        assert slow.calls == 2, "what nobody waited for was not done"
        local.endpoint.check()

    try:
        asyncio.run(serve())
    finally:
        logging.disable(logging.NOTSET)


def test_a_body_that_does_not_come_ends_with_the_deadline(opened: Any) -> None:
    async def serve() -> int:
        local = await opened()
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"x-request-timeout-ms", b"30"), (b"content-length", b"10")]
        scope = {"type": "http", "method": "POST", "path": PREDICT, "headers": headers}
        await local.endpoint(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(serve()) == 504
