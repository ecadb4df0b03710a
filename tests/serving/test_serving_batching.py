"""Micro-batches, on a batcher whose work is written here."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from mlops_ray.config.serving import Batching
from mlops_ray.errors import RequestError
from mlops_ray.serving.endpoint.batching import Batcher

LATER_S = 1e9


class Kitchen:
    """Doubles numbers; keeps what it was given at once, and in which thread."""

    def __init__(self, *, slow_s: float = 0.0, **settings: Any) -> None:
        self.batches: list[list[Any]] = []
        self.finished: list[list[Any]] = []
        self.threads: list[str] = []
        self.slow_s = slow_s
        self.gate: threading.Event | None = None
        self.now_s = 0.0
        self.batcher: Batcher[Any, list[Any]] = Batcher(
            Batching(**settings),
            self.do,
            self.finish,
            common=(OSError,),
            clock_s=lambda: self.now_s,
        )

    def do(self, works: list[Any]) -> list[Any]:
        self.batches.append(list(works))
        self.threads.append(threading.current_thread().name)
        if self.gate is not None:
            self.gate.wait(10)
        self.now_s += self.slow_s
        for work in works:
            if isinstance(work, Exception):
                raise work
        return [work * 2 for work in works]

    def finish(self, works: list[Any], done: list[Any]) -> None:
        self.finished.append(done)

    async def serve(self, *works: Any, rows: int = 1, **more: Any) -> list[Any]:
        waiting = [self.batcher.submit(work, rows, LATER_S, **more) for work in works]
        return await asyncio.gather(*waiting, return_exceptions=True)


def test_requests_that_are_there_at_once_are_one_batch() -> None:
    kitchen = Kitchen()
    assert asyncio.run(kitchen.serve(1, 2, 3)) == [None] * 3
    assert kitchen.batches == [[1, 2, 3]]
    assert kitchen.finished == [[2, 4, 6]]


def test_limits_and_those_that_stay_apart() -> None:
    kitchen = Kitchen(max_rows=4)
    asyncio.run(kitchen.serve(1, 2, 3, rows=2))
    assert kitchen.batches == [[1, 2], [3]]
    kitchen = Kitchen(max_rows=4)
    asyncio.run(kitchen.serve(1, 2, rows=9))
    assert kitchen.batches == [[1], [2]]
    kitchen = Kitchen(enabled=False)
    asyncio.run(kitchen.serve(1, 2, 3))
    assert kitchen.batches == [[1], [2], [3]]
    kitchen = Kitchen()
    asyncio.run(kitchen.serve(1, 2, 3, apart=True))
    assert kitchen.batches == [[1], [2], [3]]


def test_one_that_fails_fails_alone() -> None:
    kitchen = Kitchen()
    poison = ValueError("poison")
    assert asyncio.run(kitchen.serve(1, poison, 3)) == [None, poison, None]
    assert kitchen.finished == [[2], [6]]


def test_an_error_of_all_is_not_tried_for_each() -> None:
    kitchen = Kitchen()
    gone = OSError("the store is gone")
    assert asyncio.run(kitchen.serve(1, gone, 3)) == [gone] * 3
    assert len(kitchen.batches) == 1


def test_what_is_late_or_not_waited_for_is_not_done() -> None:
    kitchen = Kitchen()

    async def serve() -> list[Any]:
        now_s = asyncio.get_running_loop().time()
        late = asyncio.ensure_future(kitchen.batcher.submit(1, 1, now_s - 1))
        gone = asyncio.ensure_future(kitchen.batcher.submit(2, 1, LATER_S))
        stays = asyncio.ensure_future(kitchen.batcher.submit(3, 1, LATER_S))
        await asyncio.sleep(0)
        gone.cancel()
        return await asyncio.gather(late, gone, stays, return_exceptions=True)

    late, gone, stays = asyncio.run(serve())
    assert isinstance(late, RequestError)
    assert late.status == 504
    assert isinstance(gone, asyncio.CancelledError)
    assert stays is None
    assert kitchen.batches == [[3]]


def test_slow_work_goes_on_in_a_thread_and_comes_back() -> None:
    kitchen = Kitchen(slow_s=0.03)

    async def serve() -> None:
        await kitchen.serve(1)
        kitchen.gate = threading.Event()
        waiting = asyncio.ensure_future(kitchen.serve(2))
        for _ in range(3):
            await asyncio.sleep(0.01)
        # The loop turns while the batch is worked on; what comes meanwhile is the next batch.
        assert not waiting.done()
        kitchen.now_s += 5
        assert kitchen.batcher.busy_s == 5
        later = asyncio.ensure_future(kitchen.serve(3, 4))
        await asyncio.sleep(0.01)
        assert kitchen.batcher.queued == 2
        kitchen.slow_s = 0
        gate, kitchen.gate = kitchen.gate, None
        gate.set()
        await asyncio.gather(waiting, later)
        await kitchen.serve(5)

    asyncio.run(serve())
    assert kitchen.batches == [[1], [2], [3, 4], [5]]
    assert [name.startswith("batch") for name in kitchen.threads] == [False, True, True, False]
    assert kitchen.batcher.busy_s == 0


def test_the_limit_follows_the_target() -> None:
    kitchen = Kitchen(slow_s=0.008, target="1ms", max_rows=64)
    limits = []
    for _ in range(4):
        asyncio.run(kitchen.serve(*range(kitchen.batcher.max_rows)))
        limits.append(kitchen.batcher.max_rows)
    assert limits == [32, 16, 8, 4]
    kitchen.slow_s = 0
    asyncio.run(kitchen.serve(1))
    assert kitchen.batcher.max_rows == 4, "one row says nothing about more"
    for _ in range(20):
        asyncio.run(kitchen.serve(*range(kitchen.batcher.max_rows)))
    assert kitchen.batcher.max_rows == 64
