"""Micro-batches, on a batcher whose work is written here."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from mlops_ray.config.serving import Batching
from mlops_ray.errors import RequestError
from mlops_ray.serving.endpoint.batching import Batcher

LATER_S = 1e9


class Kitchen:
    """Doubles numbers; keeps what it was given at once, and in which thread."""

    def __init__(self, *, slow_s: float = 0.0, each_s: float = 0.0, **settings: Any) -> None:
        self.batches: list[list[Any]] = []
        self.finished: list[list[Any]] = []
        self.threads: list[str] = []
        self.awaited: list[list[bool]] = []
        self.slow_s = slow_s
        self.each_s = each_s
        self.waits = False
        self.gate: threading.Event | None = None
        self.now_s = 0.0
        self.batcher: Batcher[Any, list[Any]] = Batcher(
            Batching(**settings),
            self.do,
            self.finish,
            common=(OSError,),
            may_wait=lambda: self.waits,
            clock_s=lambda: self.now_s,
        )

    def do(self, works: list[Any]) -> list[Any]:
        self.batches.append(list(works))
        self.threads.append(threading.current_thread().name)
        if self.gate is not None:
            self.gate.wait(10)
        self.now_s += self.slow_s + self.each_s * len(works)
        for work in works:
            if isinstance(work, Exception):
                raise work
        return [work * 2 for work in works]

    def finish(self, works: list[Any], done: list[Any], awaited: list[bool]) -> None:
        self.finished.append(done)
        self.awaited.append(awaited)

    async def serve(self, *works: Any, rows: int = 1) -> list[Any]:
        waiting = [self.batcher.submit(work, rows, LATER_S) for work in works]
        return await asyncio.gather(*waiting, return_exceptions=True)


def test_requests_that_are_there_at_once_are_one_batch() -> None:
    kitchen = Kitchen()
    assert asyncio.run(kitchen.serve(1, 2, 3)) == [None] * 3
    assert kitchen.batches == [[1, 2, 3]]
    assert kitchen.finished == [[2, 4, 6]]


def test_after_many_alone_one_is_done_at_once_until_there_is_company() -> None:
    kitchen = Kitchen()

    async def turns() -> int:
        """Return how often a request lets others go first."""
        found = 0
        waiting = kitchen.batcher.submit(0, 1, LATER_S).__await__()
        for _ in waiting:
            found += 1
            await asyncio.sleep(0)
        return found

    async def run() -> None:
        alone = [await turns() for _ in range(100)]
        assert alone[0] == 1
        assert 0 < sum(alone[50:]) < 10
        await kitchen.serve(*range(20))
        await kitchen.serve(1, 2, 3)

    asyncio.run(run())
    assert kitchen.batches[-1] == [1, 2, 3]


def test_a_batch_has_a_bound() -> None:
    kitchen = Kitchen(max_rows=4)
    asyncio.run(kitchen.serve(1, 2, 3, rows=2))
    assert kitchen.batches == [[1, 2], [3]]
    kitchen = Kitchen(max_rows=4)
    asyncio.run(kitchen.serve(1, 2, rows=9))
    assert kitchen.batches == [[1], [2]]
    kitchen = Kitchen(enabled=False)
    asyncio.run(kitchen.serve(1, 2, 3))
    assert kitchen.batches == [[1], [2], [3]]


def test_one_that_fails_fails_alone() -> None:
    kitchen = Kitchen()
    poison = ValueError("poison")
    assert asyncio.run(kitchen.serve(1, poison, 3)) == [None, poison, None]
    assert kitchen.finished == [[2], [6]]


def test_the_neighbours_of_one_that_fails_stay_together() -> None:
    kitchen = Kitchen()
    poison = ValueError("poison")
    works: list[Any] = [*range(150), poison, *range(151, 300)]
    found = asyncio.run(kitchen.serve(*works))
    assert found == [None] * 150 + [poison] + [None] * 149
    assert len(kitchen.batches) <= 2 * 9 + 1
    done = [value for batch in kitchen.finished for value in batch]
    assert sorted(done) == [n * 2 for n in range(300) if n != 150]


def test_halves_of_a_batch_leave_out_who_is_gone_or_late_and_go_to_the_thread() -> None:
    kitchen = Kitchen(slow_s=0.03)
    poison = ValueError("poison")

    async def serve() -> list[Any]:
        deadline_s = asyncio.get_running_loop().time() + 0.2
        kitchen.gate = threading.Event()
        kitchen.batcher.expect(1.0)
        submit = kitchen.batcher.submit
        works: list[tuple[Any, float]] = [
            (1, LATER_S), (2, deadline_s), (3, LATER_S), (poison, LATER_S)
        ]  # fmt: skip
        tasks = [asyncio.ensure_future(submit(work, 1, at_s)) for work, at_s in works]
        await asyncio.sleep(0.25)
        tasks[2].cancel()
        kitchen.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, late, gone, failed = asyncio.run(serve())
    assert first is None
    assert isinstance(late, RequestError)
    assert late.status == 504
    assert isinstance(gone, asyncio.CancelledError)
    assert failed is poison
    assert kitchen.batches == [[1, 2, 3, poison], [1], [poison]]
    assert all(name.startswith("batch") for name in kitchen.threads)


@pytest.mark.parametrize("slow", [False, True])
def test_an_error_that_no_future_takes_reaches_the_one_it_concerns(slow: bool) -> None:
    kitchen = Kitchen()
    kitchen.batcher.expect(1.0 if slow else 0.0)

    async def serve() -> list[Any]:
        async with asyncio.timeout(5):
            return await kitchen.serve(1, StopIteration(), 3)

    first, failed, third = asyncio.run(serve())
    assert first is third is None
    assert isinstance(failed, RuntimeError)
    assert isinstance(failed.__cause__, StopIteration)


def test_who_is_told_of_the_end_is_told_whatever_ends_the_work() -> None:
    kitchen = Kitchen()
    kitchen.batcher.expect(1.0)

    def leave(works: list[Any]) -> Any:
        if 1 in works:
            raise GeneratorExit
        return works

    kitchen.batcher._do = leave

    async def serve() -> list[Any]:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        async with asyncio.timeout(5):
            found = await kitchen.serve(1)
            return found + await kitchen.serve(2)

    failed, later = asyncio.run(serve())
    assert isinstance(failed, Exception)
    assert later is None


def test_who_went_away_while_the_work_was_done_is_named_to_finish() -> None:
    kitchen = Kitchen()
    kitchen.batcher.expect(1.0)

    async def serve() -> None:
        kitchen.gate = threading.Event()
        tasks = [asyncio.ensure_future(kitchen.batcher.submit(n, 1, LATER_S)) for n in (1, 2)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        kitchen.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(serve())
    assert kitchen.batches == [[1, 2]]
    assert kitchen.awaited == [[False, True]]


def test_work_that_may_have_to_wait_is_done_in_the_thread_and_says_nothing_of_rows() -> None:
    kitchen = Kitchen(slow_s=0.3, max_rows=64)
    kitchen.waits = True
    for _ in range(3):
        asyncio.run(kitchen.serve(*range(64)))
    assert kitchen.batcher.max_rows == 64
    kitchen.slow_s = 0
    asyncio.run(kitchen.serve(1))
    assert all(name.startswith("batch") for name in kitchen.threads)
    kitchen.waits = False
    asyncio.run(kitchen.serve(1))
    assert not kitchen.threads[-1].startswith("batch")


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
    kitchen = Kitchen(each_s=0.001, target="16ms", max_rows=128)
    for _ in range(12):
        asyncio.run(kitchen.serve(*range(kitchen.batcher.max_rows)))
    assert 14 <= kitchen.batcher.max_rows <= 20, "16 rows take as long as they may"
    low = kitchen.batcher.max_rows
    kitchen.each_s = 0
    asyncio.run(kitchen.serve(1))
    assert kitchen.batcher.max_rows == low, "one row says nothing about more"
    for _ in range(40):
        asyncio.run(kitchen.serve(*range(kitchen.batcher.max_rows)))
    assert kitchen.batcher.max_rows == 128


def test_one_long_pause_does_not_take_more_than_half() -> None:
    kitchen = Kitchen(slow_s=5.0, max_rows=128)
    asyncio.run(kitchen.serve(*range(128)))
    assert kitchen.batcher.max_rows == 64


def test_smaller_batches_are_not_made_where_they_take_as_long() -> None:
    kitchen = Kitchen(slow_s=0.025, target="20ms", max_rows=64)
    limits = []
    for _ in range(200):
        asyncio.run(kitchen.serve(*range(64)))
        limits.append(kitchen.batcher.max_rows)
    assert min(limits) >= 16
    assert sorted(limits)[len(limits) // 10] == 64, "all but a few, which find out"


def test_rows_may_take_as_long_as_what_a_batch_costs_without_them() -> None:
    kitchen = Kitchen(slow_s=0.03, each_s=0.001, target="20ms", max_rows=256)
    for _ in range(60):
        asyncio.run(kitchen.serve(*range(256)))
    assert 25 <= kitchen.batcher.max_rows <= 40


def test_there_are_always_some_rows_in_a_batch() -> None:
    kitchen = Kitchen(each_s=0.1, target="1ms", max_rows=64)
    for _ in range(10):
        asyncio.run(kitchen.serve(*range(64)))
    assert 8 <= kitchen.batcher.max_rows <= 10
    single = Kitchen(each_s=0.1, target="1ms", max_rows=2)
    asyncio.run(single.serve(1, 2))
    assert single.batcher.max_rows == 2
