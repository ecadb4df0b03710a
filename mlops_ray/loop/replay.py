"""History, sent to the endpoint in time order on a virtual clock."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import pyarrow as pa

from mlops_ray.config.monitoring import Loop, Monitoring, Replay
from mlops_ray.errors import MlopsRayError
from mlops_ray.loop.clock import VirtualClock
from mlops_ray.loop.controller import deadline
from mlops_ray.loop.recording import (
    Answers,
    Cursor,
    Kind,
    Recording,
    Sent,
    join_rows,
    percentile_ms,
)
from mlops_ray.loop.results import ReplayResult
from mlops_ray.loop.traffic import Request, Traffic
from mlops_ray.serving.client.http import AsyncClient

_DAY = timedelta(days=1)
_POLL_S = 0.2
_BACKGROUND_PAUSE_S = 0.05
_RECENT_REQUESTS = 64

# The offline store is read only by retrainings, which are preceded by a commit of their own; one
# after each day would cost a tenth of the replay's time.
_COMMIT_EVERY = timedelta(days=7)

_LATE_REPORTS_S = (0.05, 0.2, 1.0, 3.0)


class Pipeline(Protocol):
    """The feature pipeline that keeps the online store fresh."""

    def advance(self, until: datetime, commit: bool = True) -> int:
        """Bring the online store up to ``until``."""

    def commit(self) -> Any:
        """Write what was advanced to the offline store."""


class LoopMonitor(Protocol):
    """The project's controller; see ``Controller`` for what each method promises."""

    async def begin(self, session: str, checkpoint: str | None) -> dict[str, Any]:
        """Start a session, or go back to a checkpoint of it."""

    async def checkpoint(self, name: str) -> None:
        """Keep the present state."""

    async def tick(self, now: datetime) -> dict[str, Any]:
        """Measure and decide; leave it to ``start_retraining`` to act."""

    async def start_retraining(self) -> dict[str, Any]:
        """Submit the retraining that was triggered."""

    async def poll(self, now: datetime) -> dict[str, Any]:
        """Look after a running retraining."""

    async def history(self) -> list[dict[str, Any]]:
        """Return everything that was measured and done."""

    async def rows(self, since: datetime, until: datetime) -> pa.Table:
        """Return the observed predictions of a stretch of time."""


class Replayer:
    """Sends ``traffic`` to an endpoint hour by virtual hour, and lets the controller act on it.

    At each step H of the clock: the pipeline brings the online store up to H; labels known by H are
    posted; if a tick is due, the controller judges as of H; then the requests of [H, H + step) are
    sent. A triggered retraining starts once the offline store is complete up to H. It has until its
    trigger's time plus ``loop.budget``: there the clock waits for it, while recent requests go on
    being sent.

    After each day, and whenever a retraining begins or ends, all results and the controller's state
    are on disk. A replay that was killed goes on from there when it is run again under the same
    ``session``.

    Args:
        say: Called with the rows done and a message whenever a day is done.
    """

    def __init__(
        self,
        session: str,
        traffic: Traffic,
        replay: Replay,
        monitoring: Monitoring,
        loop: Loop,
        *,
        client: AsyncClient,
        pipeline: Pipeline,
        monitor: LoopMonitor,
        recording: Recording,
        say: Callable[[int, str], None] = lambda rows, message: None,
    ) -> None:
        self._session = session
        self._traffic = traffic
        self._replay = replay
        self._every = monitoring.every
        self._budget = loop.budget
        self._client = client
        self._pipeline = pipeline
        self._monitor = monitor
        self._recording = recording
        self._say = say
        self._clock = VirtualClock(replay.start)
        self._status: dict[str, Any] = {}
        self._recent: deque[Request] = deque(maxlen=_RECENT_REQUESTS)
        self._answers, self._sent = Answers(), Sent()
        self._since = self._labels_until = self._committed = replay.start
        self._rows_done = self._unlogged_rows = 0
        self._wall_s = 0.0
        self._resumed_s = time.perf_counter()

    async def run(self, versions: dict[str, int]) -> ReplayResult:
        """Send everything; return what came of it. ``versions`` are those deployed at the start."""
        await self._begin()
        while self._clock.now() < self._replay.end:
            since = self._clock.now()
            until = min(_next_day(since), self._replay.end)
            for hour in _steps(since, until, self._replay.step):
                await self._hour(hour, min(hour + self._replay.step, until))
            self._clock.advance(until)
            if until - self._committed >= _COMMIT_EVERY:
                self._commit()
            await self._save()
        await self._end()
        return self._result(versions)

    async def _begin(self) -> None:
        cursor = self._recording.cursor()
        if cursor is None or cursor.session != self._session:
            self._recording.clear()
            self._status = await self._monitor.begin(self._session, None)
            return
        self._status = await self._monitor.begin(self._session, cursor.checkpoint)
        self._clock = VirtualClock(cursor.next)
        self._labels_until = cursor.labels_until
        self._wall_s, self._unlogged_rows = cursor.wall_s, cursor.unlogged_rows
        self._since = cursor.next
        self._recording.cut(cursor.next)
        self._rows_done = len(self._recording.rows())

    async def _hour(self, hour: datetime, until: datetime) -> None:
        self._clock.advance(hour)
        self._pipeline.advance(hour, commit=False)
        await self._follow_retraining(hour)
        labels = self._traffic.labels(self._labels_until, hour)
        self._labels_until = hour
        requests = self._traffic.requests(hour, until)
        if self._tick_due(hour):
            await self._send(labels, [])
            await self._tick(hour)
            labels = []
        await self._send(labels, requests)
        self._recent.extend(requests)

    def _tick_due(self, now: datetime) -> bool:
        last = self._status["now"]
        since = datetime.fromisoformat(last) if last else self._replay.start
        return self._status["phase"] == "triggered" or now - since >= self._every

    async def _tick(self, now: datetime) -> None:
        self._status = await self._monitor.tick(now)
        if self._status["phase"] == "triggered":
            # Training reads the offline store: it must hold everything up to now.
            self._commit()
            self._status = await self._monitor.start_retraining()
            await self._save()

    def _commit(self) -> None:
        self._pipeline.commit()
        self._committed = self._clock.now()

    async def _follow_retraining(self, now: datetime) -> None:
        """Where a retraining is under way: see how it is, and at its deadline wait for its end."""
        if self._status["phase"] != "retraining":
            return
        self._status = await self._monitor.poll(now)
        last = deadline(self._status, self._budget)
        if last is not None and now >= last:
            await self._await_retraining(now)
        if self._status["phase"] != "retraining":
            # A promotion cannot be taken back: nothing before it may be sent again.
            await self._save()

    async def _await_retraining(self, now: datetime) -> None:
        waiting = asyncio.Event()
        background = asyncio.create_task(self._send_recent(waiting))
        try:
            while self._status["phase"] == "retraining":
                self._report("waiting for the retraining")
                await asyncio.sleep(_POLL_S)
                self._status = await self._monitor.poll(now)
        finally:
            waiting.set()
            await background

    async def _send_recent(self, stop: asyncio.Event) -> None:
        """Send recent requests again, unlogged, until told to stop: a swap must not drop any."""
        for request in itertools.cycle(list(self._recent)):
            if stop.is_set():
                return
            await self._predict(request, "background")
            await asyncio.sleep(_BACKGROUND_PAUSE_S)

    async def _send(self, labels: list[list[dict[str, Any]]], requests: list[Request]) -> None:
        jobs: Iterator[Request | list[dict[str, Any]]] = iter([*labels, *requests])

        async def work() -> None:
            for job in jobs:
                if isinstance(job, Request):
                    await self._predict(job, "predict")
                else:
                    await self._feedback(job)

        workers = min(self._replay.concurrency, len(labels) + len(requests))
        await asyncio.gather(*(work() for _ in range(workers)))

    async def _predict(self, request: Request, kind: Kind) -> None:
        began = time.perf_counter()
        error = None
        try:
            answer = await self._client.predict(
                request.rows, ids=request.ids, log=kind == "predict"
            )
        except MlopsRayError as failure:
            error = str(failure)
        else:
            if kind == "predict":
                self._answers.add(answer.ids, answer.versions, answer.scores)
        latency_ms = (time.perf_counter() - began) * 1000
        self._sent.add(request.time, len(request.rows), latency_ms, error, kind)

    async def _feedback(self, labels: list[dict[str, Any]]) -> None:
        began = time.perf_counter()
        error = None
        try:
            await self._client.feedback(labels)
        except MlopsRayError as failure:
            error = str(failure)
        latency_ms = (time.perf_counter() - began) * 1000
        self._sent.add(self._clock.now(), len(labels), latency_ms, error, "feedback")

    async def _save(self) -> None:
        """Write down what was done up to now. The cursor moves last: what it covers is on disk."""
        since, until = self._since, self._clock.now()
        if until > since:
            await self._write(since, until)
        checkpoint = f"{until:%Y%m%dT%H%M%SZ}-{time.time_ns()}"
        await self._monitor.checkpoint(checkpoint)
        self._recording.move(
            Cursor(
                session=self._session,
                next=until,
                labels_until=self._labels_until,
                checkpoint=checkpoint,
                wall_s=self._elapsed_s(),
                unlogged_rows=self._unlogged_rows,
            )
        )
        self._since = until
        self._report(self._status["phase"])

    async def _write(self, since: datetime, until: datetime) -> None:
        outcomes = self._traffic.outcomes(since, until)
        observed = await self._monitor.rows(since, until)
        for pause_s in _LATE_REPORTS_S:
            if len(observed) >= len(self._answers.ids):
                break
            await asyncio.sleep(pause_s)
            observed = await self._monitor.rows(since, until)
        rows = join_rows(self._answers, outcomes, observed)
        self._recording.write(since, rows, self._sent)
        self._unlogged_rows += max(len(rows) - len(observed), 0)
        self._rows_done += len(rows)
        self._answers, self._sent = Answers(), Sent()

    def _elapsed_s(self) -> float:
        now_s = time.perf_counter()
        self._wall_s += now_s - self._resumed_s
        self._resumed_s = now_s
        return self._wall_s

    async def _end(self) -> None:
        """Bring the clock to its end: the last labels, and the end of a retraining under way."""
        end = self._replay.end
        self._pipeline.advance(end, commit=True)
        await self._send(self._traffic.labels(self._labels_until, end), [])
        if self._status["phase"] == "retraining":
            await self._await_retraining(end)
        await self._write(end, end)
        self._recording.write_history(await self._monitor.history())
        self._elapsed_s()

    def _report(self, state: str) -> None:
        served = self._status["served"] or {}
        performance = (self._status["measurement"] or {}).get("performance", {})
        parts = [f"{self._clock.now():%Y-%m-%d}", f"v{served.get('version', '?')}"]
        if performance.get("auc") is not None:
            parts.append(f"AUC {performance['auc']:.3f}")
        self._say(self._rows_done, " · ".join([*parts, state]))

    def _result(self, versions: dict[str, int]) -> ReplayResult:
        requests = self._recording.requests()
        kinds = Counter(requests["kind"].to_pylist())
        return ReplayResult(
            folder=str(self._recording.folder),
            start=self._replay.start,
            end=self._replay.end,
            rows=self._rows_done,
            requests=kinds["predict"],
            background_requests=kinds["background"],
            failed_requests=len(requests) - requests["error"].null_count,
            unlogged_rows=self._unlogged_rows,
            p50_ms=percentile_ms(requests, 50),
            p99_ms=percentile_ms(requests, 99),
            wall_s=round(self._wall_s, 3),
            versions=versions,
        )


def _next_day(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + _DAY


def _steps(since: datetime, until: datetime, step: timedelta) -> Iterator[datetime]:
    while since < until:
        yield since
        since += step
