"""What a replica has answered and been told, kept until it is on disk.

The request path only appends to lists. A thread makes frames of them and appends these to the
replica's files, from where they are read by whoever wants to know: the monitor, and the compaction
into Delta tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlops_ray.config.features import RequestField
from mlops_ray.config.serving import PredictionLog as Settings
from mlops_ray.errors import ServingError
from mlops_ray.serving.formats.feedback import Feedback
from mlops_ray.serving.log.compaction import compact
from mlops_ray.serving.log.encoding import Answered, Encoding, Received, Told
from mlops_ray.serving.log.redaction import open_redaction
from mlops_ray.serving.log.writer import SegmentWriter

logger = logging.getLogger(__name__)

MAX_PENDING_ROWS = 500_000
"""Rows kept in memory while the disk refuses them; beyond, rows are dropped and counted."""


class PredictionLog:
    """The log of one replica, in the project's folder of predictions; see ``prediction_log.layout``.

    All methods belong to the event loop's thread. With ``durability: interval`` what a kill can lose
    is what was added within the last ``every``, and the time of one write. With ``answered`` whoever
    answers awaits ``written`` before: requests that wait at the same time share one write.

    While the disk refuses, rows wait in memory, ``MAX_PENDING_ROWS`` of them, and are tried again;
    with ``answered`` they are not kept, since nobody has been answered.

    Args:
        folder: The project's prediction log.
        replica: The name of this replica, unlike any other's, ever.
        inputs: The fields of a request and their types.
        settings: What is kept, and how well.
    """

    def __init__(
        self, folder: Path, replica: str, inputs: Mapping[str, RequestField], settings: Settings
    ) -> None:
        self.answers_wait = settings.durability == "answered"
        self.dropped_rows = 0
        self._folder = folder
        self._settings = settings
        self._encoding = Encoding(inputs, settings, open_redaction(folder, settings.redact))
        # No other process may ever continue this one's numbers.
        self._writer = SegmentWriter(
            folder, f"{replica}-{uuid.uuid4().hex[:8]}", settings.compact_every.total_seconds()
        )
        self._thread = ThreadPoolExecutor(1, "prediction-log")
        self._answered: list[Received] = []
        self._labels: list[Told] = []
        self._rows = 0
        self._sequence = 0
        self._frames: deque[_Frame] = deque()
        self._flushing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._waiting: asyncio.Future[OSError | None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._failing: str | None = None

    @property
    def pending_rows(self) -> int:
        """Rows and labels that are not on disk yet."""
        return self._rows

    def describe(self) -> dict[str, Any]:
        """Return how the log is, as a JSON value; ``failing`` says why the disk refuses now."""
        return {
            "pending_rows": self._rows,
            "dropped_rows": self.dropped_rows,
            "failing": self._failing,
        }

    def add(self, answered: Answered) -> None:
        """Keep answered rows.

        Raises:
            ServingError: Answers wait, and too many rows wait for the disk.
        """
        if self._take(len(answered.ids)):
            self._answered.append((time.time_ns(), answered))

    def add_labels(self, feedback: Feedback) -> None:
        """Keep labels. The same label may come again: readers take the last one of an id.

        Raises:
            ServingError: As ``add``.
        """
        if self._take(len(feedback.ids)):
            self._labels.append((time.time_ns(), feedback))

    async def written(self) -> None:
        """Return when all that has been added is on disk.

        Raises:
            ServingError: The disk refuses. Where answers wait, what was added is not kept.
        """
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_future()
            self._wake.set()
        # One that gives up must not take the future away from the others.
        error = await asyncio.shield(self._waiting)
        if error is not None:
            raise self._unwritable(str(error)) from error

    async def flush(self) -> int:
        """Write all that has been added; return how many rows and labels were written.

        Raises:
            OSError: The disk refuses. The rows are kept in memory, unless answers wait.
        """
        async with self._flushing:
            answered, self._answered = self._answered, []
            labels, self._labels = self._labels, []
            waiting, self._waiting = self._waiting, None
            outcome = _Outcome()
            if self._rows:
                outcome = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._write, answered, labels
                )
            self._settle(outcome)
            if waiting is not None and not waiting.done():
                waiting.set_result(outcome.error)
            if outcome.error is not None:
                raise outcome.error
            return outcome.written

    def start(self) -> None:
        """Begin to write every ``every``, and to compact every ``compact_every``."""
        self._tasks = [
            asyncio.create_task(self._write_repeatedly()),
            asyncio.create_task(self._compact_repeatedly()),
        ]

    async def close(self) -> None:
        """Write the rest and let go of the files; the log takes nothing any more."""
        for task in self._tasks:
            task.cancel()
        try:
            await self.flush()
        except OSError:
            logger.exception("the last %d rows could not be written", self._rows)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._writer.close)
        self._thread.shutdown()

    def _take(self, rows: int) -> bool:
        if self._rows < MAX_PENDING_ROWS:
            self._rows += rows
            return True
        if self.answers_wait:
            raise self._unwritable(f"{self._rows} rows wait for the disk")
        self.dropped_rows += rows
        return False

    def _unwritable(self, why: str) -> ServingError:
        return ServingError(
            "the prediction log cannot be written",
            where=str(self._folder),
            why=why,
            fix="free some space on its disk, or set serving.log.durability to interval",
        )

    async def _write_repeatedly(self) -> None:
        every_s = self._settings.every.total_seconds()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), every_s)
            self._wake.clear()
            try:
                await self.flush()
            except OSError:
                # It has been said; what waits is tried again.
                await asyncio.sleep(every_s)

    async def _compact_repeatedly(self) -> None:
        every_s = self._settings.compact_every.total_seconds()
        while True:
            # Replicas that start together do not all wake at once.
            await asyncio.sleep(every_s * random.uniform(0.5, 1.0))
            try:
                await asyncio.to_thread(compact, self._folder, self._settings.keep)
            except Exception:
                logger.exception("the prediction log could not be compacted; it is tried again")

    def _settle(self, outcome: _Outcome) -> None:
        """Take over what the writing thread has achieved."""
        self._rows -= outcome.written + outcome.dropped
        self.dropped_rows += outcome.dropped
        if outcome.error is None:
            if self._failing is not None:
                logger.warning("the prediction log is written again")
            self._failing = None
            return
        if self.answers_wait:
            self._rows -= sum(frame.rows for frame in self._frames)
            self._frames.clear()
        if self._failing is None:
            logger.error("the prediction log cannot be written: %s", outcome.error)
        self._failing = str(outcome.error)

    def _write(self, answered: list[Received], labels: list[Told]) -> _Outcome:
        """Write the frames that wait, and then one of these; in the writing thread."""
        outcome = _Outcome()
        if answered or labels:
            outcome.dropped = self._encode(answered, labels)
        try:
            while self._frames:
                # The very same bytes as in a failed try: who has seen these will see no others.
                frame = self._frames[0]
                self._writer.append(frame.sequence, frame.data)
                self._frames.popleft()
                outcome.written += frame.rows
        except OSError as error:
            outcome.error = error
        return outcome

    def _encode(self, answered: list[Received], labels: list[Told]) -> int:
        """Make a frame; return how many rows had to be left out."""
        try:
            self._append_frame(answered, labels)
            return 0
        except Exception:
            logger.exception("some rows cannot be logged")
        dropped = 0
        for item in answered:
            try:
                self._append_frame([item], [])
            except Exception:
                dropped += len(item[1].ids)
        for told in labels:
            try:
                self._append_frame([], [told])
            except Exception:
                dropped += len(told[1].ids)
        return dropped

    def _append_frame(self, answered: list[Received], labels: list[Told]) -> None:
        data = self._encoding.frame(self._sequence + 1, answered, labels)
        self._sequence += 1
        rows = sum(len(i.ids) for _, i in answered) + sum(len(i.ids) for _, i in labels)
        self._frames.append(_Frame(self._sequence, rows, data))


@dataclass(frozen=True)
class _Frame:
    sequence: int
    rows: int
    data: bytes


@dataclass
class _Outcome:
    """What became of a try to write: rows, and the error that ended it."""

    written: int = 0
    dropped: int = 0
    error: OSError | None = None
