"""Micro-batches: requests that are in the event loop at the same time are worked on as one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from mlops_ray.config.serving import Batching
from mlops_ray.errors import RequestError
from mlops_ray.serving.endpoint.pace import Pace

SLOW_S = 0.02
"""From this on, the work of batches goes on in a thread, so that the event loop can do other things."""

_QUICK_S = 0.005
_LONELY = 16

Work = TypeVar("Work")
Done = TypeVar("Done")


class _CutOffError(Exception):
    """Something ended the work that is no error of it."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Work]):
    work: Work
    rows: int
    deadline_s: float
    future: asyncio.Future[None]


class Batcher(Generic[Work, Done]):
    """Gathers what is there and has it done as one; nothing waits for others to come.

    The first request asks the event loop for a turn, which comes when the others that are ready have
    been read: a few microseconds later where there are none. After many batches of one request, a
    request goes without that turn, but for every sixteenth, to see whether there is company by now.
    Batches have at most ``max_rows``, and fewer where so many take longer than ``target``
    (see ``Pace``).

    Where a batch fails, its halves are done, and theirs, before what came later: so one request fails
    alone. Work that takes more than ``SLOW_S`` moves into a thread until it is quick again; one batch
    is worked on at a time.

    Args:
        settings: The limits.
        do: Works on a batch, perhaps in a thread; what it returns is given to ``finish``.
        finish: Takes a batch, what was done, and who still waits for it, in the event loop's thread.
        common: Errors that concern a batch as a whole: doing each request alone would not help.
        may_wait: Says whether the work may have to wait for something else now, or just had to: it is
            then done in the thread, and how long it took says nothing about it.
        clock_s: The time.
    """

    def __init__(
        self,
        settings: Batching,
        do: Callable[[list[Work]], Done],
        finish: Callable[[list[Work], Done, list[bool]], None],
        common: tuple[type[Exception], ...] = (),
        may_wait: Callable[[], bool] = lambda: False,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        most = settings.max_rows if settings.enabled else 1
        self._pace = Pace(most, settings.target.total_seconds())
        self._do = do
        self._finish = finish
        self._common = common
        self._may_wait = may_wait
        self._clock_s = clock_s
        self._queue: deque[_Waiting[Work]] = deque()
        self._halves: deque[list[_Waiting[Work]]] = deque()
        self._called = False
        self._lonely = 0
        self._pool: ThreadPoolExecutor | None = None
        self._busy_since_s: float | None = None
        self._is_slow = False

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return len(self._queue) + sum(map(len, self._halves))

    @property
    def max_rows(self) -> int:
        """How many rows a batch may have now."""
        return int(self._pace.limit)

    @property
    def busy_s(self) -> float:
        """For how long the thread has been at its batch, 0 where it has none."""
        return 0.0 if self._busy_since_s is None else self._clock_s() - self._busy_since_s

    def expect(self, seconds: float) -> None:
        """Tell how long the work will take, where that is known before the first request."""
        self._is_slow = seconds > SLOW_S

    async def submit(self, work: Work, rows: int, deadline_s: float) -> None:
        """Return when the work is done and finished.

        Raises:
            Exception: What ``do`` raised for this work. RequestError 504 where its time was up
                before it began.
        """
        future = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(work, rows, deadline_s, future))
        if self._is_alone:
            self._flush()
        else:
            self._call()
        await future

    @property
    def _is_alone(self) -> bool:
        """Whether no company is to be expected for what has just come, by what the last batches were."""
        if self._called or self._busy_since_s is not None or self._lonely < _LONELY:
            return False
        return self._lonely % _LONELY != 0

    def _call(self) -> None:
        if not self._called and self._busy_since_s is None:
            self._called = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._called = False
        batch = self._take()
        if not batch:
            return
        self._lonely = self._lonely + 1 if len(batch) == 1 else 0
        if self._is_slow or self._may_wait():
            self._start(batch)
            return
        began_s = self._clock_s()
        try:
            done = self._done([waiting.work for waiting in batch])
        except BaseException:
            self._end(batch, _CutOffError(), 0.0)
            raise
        self._end(batch, done, self._clock_s() - began_s)

    def _take(self) -> list[_Waiting[Work]]:
        """Take what fits into a batch, without what nobody waits for any more."""
        now_s = asyncio.get_running_loop().time()
        while self._halves:
            half = [waiting for waiting in self._halves.popleft() if _is_due(waiting, now_s)]
            if half:
                return half
        batch: list[_Waiting[Work]] = []
        rows, limit = 0, self._pace.limit
        while self._queue:
            first = self._queue[0]
            if batch and rows + first.rows > limit:
                break
            self._queue.popleft()
            if _is_due(first, now_s):
                batch.append(first)
                rows += first.rows
        return batch

    def _done(self, works: list[Work]) -> Done | Exception:
        try:
            return self._do(works)
        except Exception as error:
            return error

    def _start(self, batch: list[_Waiting[Work]]) -> None:
        """Have a batch done in the thread."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._busy_since_s = self._clock_s()
        works = [waiting.work for waiting in batch]
        running = asyncio.get_running_loop().run_in_executor(self._pool, self._done, works)
        running.add_done_callback(partial(self._come_back, batch))

    def _come_back(
        self, batch: list[_Waiting[Work]], running: asyncio.Future[Done | Exception]
    ) -> None:
        seconds = self.busy_s
        self._busy_since_s = None
        try:
            done = running.result()
        except BaseException:
            self._end(batch, _CutOffError(), 0.0)
            raise
        self._end(batch, done, seconds)

    def _end(self, batch: list[_Waiting[Work]], done: Done | Exception, seconds: float) -> None:
        """Settle a batch, or have its halves done; see to the next one whatever comes."""
        try:
            self._adapt(sum(w.rows for w in batch), seconds)
            if isinstance(done, Exception):
                self._fail(batch, done)
            else:
                self._settle(batch, self._finished(batch, done))
        finally:
            if self._halves or self._queue:
                # Not in this turn: what has come in meanwhile is read first, health is answered.
                self._call()

    def _fail(self, batch: list[_Waiting[Work]], error: Exception) -> None:
        if len(batch) == 1 or isinstance(error, (_CutOffError, *self._common)):
            self._settle(batch, error)
            return
        middle = len(batch) // 2
        self._halves.extendleft((batch[middle:], batch[:middle]))

    def _finished(self, batch: list[_Waiting[Work]], done: Done) -> Exception | None:
        works = [waiting.work for waiting in batch]
        try:
            self._finish(works, done, [not waiting.future.done() for waiting in batch])
        except Exception as error:
            return error
        return None

    def _settle(self, batch: list[_Waiting[Work]], error: Exception | None) -> None:
        if isinstance(error, StopIteration):
            # No future takes it: where it is awaited, it would be the end of a generator.
            cause, error = error, RuntimeError("the work raised StopIteration")
            error.__cause__ = cause
        for waiting in batch:
            if waiting.future.done():
                continue
            if error is None:
                waiting.future.set_result(None)
            else:
                waiting.future.set_exception(error)

    def _adapt(self, rows: int, seconds: float) -> None:
        if self._may_wait():
            return
        self._is_slow = seconds > (_QUICK_S if self._is_slow else SLOW_S)
        self._pace.add(rows, seconds)


def _is_due(waiting: _Waiting[Work], now_s: float) -> bool:
    """Say whether somebody waits for the work; tell who has waited too long."""
    if waiting.future.done():
        return False
    if waiting.deadline_s > now_s:
        return True
    waiting.future.set_exception(RequestError("its time was up before the work began", status=504))
    return False
