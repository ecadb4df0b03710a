"""Micro-batches: requests that are in the event loop at the same time are worked on as one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from mlops_ray.config.serving import Batching
from mlops_ray.errors import RequestError

SLOW_S = 0.02
"""From this on, the work of batches goes on in a thread, so that the event loop can do other things."""

_QUICK_S = 0.005
_GROWTH = 1.25

Work = TypeVar("Work")
Done = TypeVar("Done")
Part = tuple[list[Work], Done | Exception]


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Work]):
    work: Work
    rows: int
    deadline_s: float
    apart: bool
    future: asyncio.Future[None]


class Batcher(Generic[Work, Done]):
    """Gathers what is there and has it done as one; nothing waits for others to come.

    The first request asks the event loop for a turn, which comes when the others that are ready have
    been read: a few microseconds later where there are none. Batches have at most ``max_rows``, and
    fewer where so many take longer than ``target``: the limit falls by half at most, and grows by a
    quarter.

    Where a batch fails, each request of it is done alone, so that one cannot fail the others. Work
    that takes more than ``SLOW_S`` moves into a thread until it is quick again; one batch is worked
    on at a time.

    Args:
        settings: The limits.
        do: Works on a batch, perhaps in a thread; what it returns is given to ``finish``.
        finish: Takes a batch and what was done, in the event loop's thread.
        common: Errors that concern a batch as a whole: doing each request alone would not help.
        clock_s: The time.
    """

    def __init__(
        self,
        settings: Batching,
        do: Callable[[list[Work]], Done],
        finish: Callable[[list[Work], Done], None],
        common: tuple[type[Exception], ...] = (),
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._max_rows = settings.max_rows if settings.enabled else 1
        self._target_s = settings.target.total_seconds()
        self._limit = float(self._max_rows)
        self._do = do
        self._finish = finish
        self._common = common
        self._clock_s = clock_s
        self._queue: deque[_Waiting[Work]] = deque()
        self._called = False
        self._pool: ThreadPoolExecutor | None = None
        self._busy_since_s: float | None = None
        self._is_slow = False

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    @property
    def max_rows(self) -> int:
        """How many rows a batch may have now."""
        return int(self._limit)

    @property
    def busy_s(self) -> float:
        """For how long the thread has been at its batch, 0 where it has none."""
        return 0.0 if self._busy_since_s is None else self._clock_s() - self._busy_since_s

    def expect(self, seconds: float) -> None:
        """Tell how long the work will take, where that is known before the first request."""
        self._is_slow = seconds > SLOW_S

    async def submit(
        self, work: Work, rows: int, deadline_s: float, *, apart: bool = False
    ) -> None:
        """Return when the work is done and finished; with ``apart``, as a batch of its own.

        Raises:
            Exception: What ``do`` raised for this work. RequestError 504 where its time was up
                before it began.
        """
        future = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(work, rows, deadline_s, apart, future))
        self._call()
        await future

    def _call(self) -> None:
        if not self._called and self._busy_since_s is None:
            self._called = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._called = False
        batch = self._take()
        if not batch:
            return
        if self._is_slow:
            self._start(batch)
            return
        began_s = self._clock_s()
        parts = self._attempt([waiting.work for waiting in batch])
        self._adapt(sum(w.rows for w in batch), self._clock_s() - began_s)
        self._settle(batch, parts)
        if self._queue:
            # Not in this turn: what has come in meanwhile is read first, health is answered.
            self._call()

    def _take(self) -> list[_Waiting[Work]]:
        """Take what fits into a batch, without what nobody waits for any more."""
        now_s = asyncio.get_running_loop().time()
        batch: list[_Waiting[Work]] = []
        rows = 0
        while self._queue:
            first = self._queue[0]
            if batch and (rows + first.rows > self._limit or first.apart or batch[0].apart):
                break
            self._queue.popleft()
            if first.future.done():
                continue
            if first.deadline_s <= now_s:
                first.future.set_exception(
                    RequestError("its time was up before the work began", status=504)
                )
                continue
            batch.append(first)
            rows += first.rows
        return batch

    def _attempt(self, works: list[Work]) -> list[Part[Work, Done]]:
        try:
            return [(works, self._do(works))]
        except Exception as error:
            if len(works) == 1 or isinstance(error, self._common):
                return [(works, error)]
        return [part for work in works for part in self._attempt([work])]

    def _start(self, batch: list[_Waiting[Work]]) -> None:
        """Have a batch done in the thread."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._busy_since_s = self._clock_s()
        works = [waiting.work for waiting in batch]
        running = asyncio.get_running_loop().run_in_executor(self._pool, self._attempt, works)
        running.add_done_callback(partial(self._end, batch))

    def _end(
        self, batch: list[_Waiting[Work]], running: asyncio.Future[list[Part[Work, Done]]]
    ) -> None:
        seconds = self.busy_s
        self._busy_since_s = None
        if running.cancelled():
            return
        self._adapt(sum(w.rows for w in batch), seconds)
        self._settle(batch, running.result())
        if self._queue:
            self._call()

    def _settle(self, batch: Sequence[_Waiting[Work]], parts: Sequence[Part[Work, Done]]) -> None:
        waiting = iter(batch)
        for works, done in parts:
            error = done if isinstance(done, Exception) else self._finished(works, done)
            for _ in works:
                future = next(waiting).future
                if future.done():
                    continue
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    def _finished(self, works: list[Work], done: Done) -> Exception | None:
        try:
            self._finish(works, done)
        except Exception as error:
            return error
        return None

    def _adapt(self, rows: int, seconds: float) -> None:
        self._is_slow = seconds > (_QUICK_S if self._is_slow else SLOW_S)
        if seconds > self._target_s:
            # By half at most: a pause of the machine says nothing about the rows.
            fitting = max(self._limit / 2, rows * self._target_s / seconds)
            self._limit = max(1.0, min(self._limit, fitting))
        elif rows * 2 >= self._limit and self._limit < self._max_rows:
            self._limit = min(float(self._max_rows), self._limit * _GROWTH)
