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

MAX_PENDING_BYTES = 512 << 20
"""The same of their values; an estimate."""

_VALUE_BYTES = 8
_LABEL_BYTES = 64


class Batch:
    """What goes to disk together. ``done`` says how that ended, where somebody waits for it."""

    __slots__ = ("answered", "done", "labels", "lost", "rows", "size")

    def __init__(self) -> None:
        self.answered: list[Received] = []
        self.labels: list[Told] = []
        self.rows = 0
        self.size = 0
        self.lost: list[Answered | Feedback] = []
        self.done: asyncio.Future[Exception | None] | None = None


@dataclass(slots=True)
class Added:
    """What was added, and with what it goes to disk; None where it is dropped."""

    item: Answered | Feedback
    batch: Batch | None


class PredictionLog:
    """The log of one replica, in the project's folder of predictions; see ``prediction_log.layout``.

    All methods belong to the event loop's thread. With ``durability: interval`` what a kill can lose
    is what was added within the last ``every``, and the time of one write; it waits for models in shadow
    only so long (see ``shadows``). With ``answered`` whoever
    answers awaits ``written`` before: requests that wait at the same time share one write.

    While the disk refuses, rows wait in memory, ``MAX_PENDING_ROWS`` of them or ``MAX_PENDING_BYTES``,
    and are tried again; with ``answered`` they are not kept, since nobody has been answered.

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
        self._texts = tuple(name for name, field in inputs.items() if field.dtype == "string")
        self._batch = Batch()
        self._rows = 0
        self._bytes = 0
        self._sequence = 0
        self._frames: deque[_Frame] = deque()
        self._flushing = asyncio.Lock()
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._writes: set[asyncio.Task[int]] = set()
        self._writing: asyncio.Task[None] | None = None
        self._compacting: asyncio.Task[None] | None = None
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

    def add(self, answered: Answered) -> Added:
        """Keep answered rows; return what ``written`` is asked with.

        Raises:
            ServingError: Answers wait, and too much waits for the disk, or the log is closed.
        """
        batch = self._room(answered.rows, self._size(answered))
        if batch is not None:
            batch.answered.append((time.time_ns(), answered))
        return Added(answered, batch)

    def add_labels(self, feedback: Feedback) -> Added:
        """Keep labels. The same label may come again: readers take the last one of an id.

        Raises:
            ServingError: There is no room for them: who sent them may do so again.
        """
        rows = len(feedback.ids)
        batch = self._room(rows, rows * _LABEL_BYTES, needed=True)
        if batch is not None:
            batch.labels.append((time.time_ns(), feedback))
        return Added(feedback, batch)

    async def written(self, added: Added) -> None:
        """Return when what was added is on disk; for ``durability: answered``.

        Raises:
            ServingError: It is not kept: the disk refuses, or the rows cannot be encoded.
        """
        batch = added.batch
        if batch is None:
            raise self._unwritable("too much waits for the disk")
        if batch is self._batch:
            self._wake.set()
        if batch.done is None:
            raise self._unwritable("the log does not wait for the disk")
        # One that gives up must not take the future away from the others.
        error = await asyncio.shield(batch.done)
        if error is not None:
            raise self._unwritable(str(error)) from error
        if any(item is added.item for item in batch.lost):
            raise self._unwritable("the rows cannot be encoded")

    async def flush(self) -> int:
        """Write all that has been added; return how many rows and labels were written.

        A write comes to its end also where the caller is cancelled.

        Raises:
            OSError: The disk refuses. The rows are kept in memory, unless answers wait.
        """
        write = asyncio.create_task(self._flush())
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        return await asyncio.shield(write)

    def start(self) -> None:
        """Begin to write every ``every``, and to compact every ``compact_every``."""
        self._writing = asyncio.create_task(self._write_repeatedly())
        self._compacting = asyncio.create_task(self._compact_repeatedly())

    async def close(self) -> None:
        """Write the rest and let go of the files; the log takes nothing any more."""
        self._closing.set()
        self._wake.set()
        if self._compacting is not None:
            self._compacting.cancel()
        if self._writing is not None:
            await self._writing
        try:
            await self.flush()
        except OSError:
            logger.exception("the last %d rows could not be written", self._rows)
        await asyncio.get_running_loop().run_in_executor(self._thread, self._writer.close)
        self._thread.shutdown()

    def _room(self, rows: int, size: int, *, needed: bool = False) -> Batch | None:
        """Return the batch that takes rows, None where there is no room for them.

        Raises:
            ServingError: There is none, and the rows are ``needed``, or answers wait.
        """
        full = self._rows >= MAX_PENDING_ROWS or self._bytes >= MAX_PENDING_BYTES
        if not full and not self._closing.is_set():
            batch = self._batch
            self._rows += rows
            self._bytes += size
            batch.rows += rows
            batch.size += size
            if self.answers_wait and batch.done is None:
                batch.done = asyncio.get_running_loop().create_future()
            return batch
        if needed or self.answers_wait:
            raise self._unwritable(
                f"{self._rows} rows wait for the disk" if full else "it is closed"
            )
        self.dropped_rows += rows
        return None

    def _size(self, answered: Answered) -> int:
        """Return about how many bytes answered rows hold."""
        columns = len(answered.inputs) + len(answered.columns)
        size = answered.rows * columns * _VALUE_BYTES
        for name in self._texts:
            size += sum(map(len, filter(None, answered.inputs[name].tolist())))
        return size

    def _unwritable(self, why: str) -> ServingError:
        return ServingError(
            "the prediction log cannot be written",
            where=str(self._folder),
            why=why,
            fix="free some space on its disk, or set serving.log.durability to interval",
        )

    async def _write_repeatedly(self) -> None:
        every_s = self._settings.every.total_seconds()
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), every_s)
            self._wake.clear()
            try:
                await self.flush()
            except Exception as error:
                # What waits is tried again; that the disk refuses has been said.
                if not isinstance(error, OSError):
                    logger.exception("the prediction log could not be written")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), every_s)

    async def _compact_repeatedly(self) -> None:
        every_s = self._settings.compact_every.total_seconds()
        while True:
            # Replicas that start together do not all wake at once.
            await asyncio.sleep(every_s * random.uniform(0.5, 1.0))
            try:
                await asyncio.to_thread(compact, self._folder, self._settings.keep)
            except Exception:
                logger.exception("the prediction log could not be compacted; it is tried again")

    async def _flush(self) -> int:
        async with self._flushing:
            batch, self._batch = self._batch, Batch()
            outcome = _Outcome()
            ending: Exception | None = RuntimeError("the write was cut short")
            try:
                if self._rows:
                    outcome = await asyncio.get_running_loop().run_in_executor(
                        self._thread, self._write, batch
                    )
                self._settle(outcome)
                ending = outcome.error
            finally:
                if batch.done is not None:
                    batch.done.set_result(ending)
            if outcome.error is not None:
                raise outcome.error
            return outcome.written

    def _settle(self, outcome: _Outcome) -> None:
        """Take over what the writing thread has achieved."""
        self._rows -= outcome.written + outcome.dropped
        self._bytes -= outcome.size
        self.dropped_rows += outcome.dropped
        if outcome.error is None:
            if self._failing is not None:
                logger.warning("the prediction log is written again")
            self._failing = None
            return
        if self.answers_wait:
            self._rows -= sum(frame.rows for frame in self._frames)
            self._bytes -= sum(frame.size for frame in self._frames)
            self._frames.clear()
        if self._failing is None:
            logger.error("the prediction log cannot be written: %s", outcome.error)
        self._failing = str(outcome.error)

    def _write(self, batch: Batch) -> _Outcome:
        """Write the frames that wait, and then those of this batch; in the writing thread."""
        outcome = _Outcome()
        if batch.rows:
            self._encode(batch, outcome)
        try:
            while self._frames:
                # The very same bytes as in a failed try: who has seen these will see no others.
                frame = self._frames[0]
                self._writer.append(frame.sequence, frame.data)
                self._frames.popleft()
                outcome.written += frame.rows
                outcome.size += frame.size
        except OSError as error:
            outcome.error = error
        return outcome

    def _encode(self, batch: Batch, outcome: _Outcome) -> None:
        """Make a frame; where that cannot be, one of each item, and leave out what cannot be one."""
        try:
            self._append_frame(batch.answered, batch.labels, batch.size)
            return
        except Exception:
            logger.exception("some rows cannot be logged")
        for item in batch.answered:
            self._encode_alone(batch, outcome, item[1], [item], [], self._size(item[1]))
        for told in batch.labels:
            size = len(told[1].ids) * _LABEL_BYTES
            self._encode_alone(batch, outcome, told[1], [], [told], size)

    def _encode_alone(
        self,
        batch: Batch,
        outcome: _Outcome,
        item: Answered | Feedback,
        answered: list[Received],
        labels: list[Told],
        size: int,
    ) -> None:
        try:
            self._append_frame(answered, labels, size)
        except Exception:
            batch.lost.append(item)
            outcome.dropped += item.rows
            outcome.size += size

    def _append_frame(self, answered: list[Received], labels: list[Told], size: int) -> None:
        data = self._encoding.frame(self._sequence + 1, answered, labels)
        self._sequence += 1
        rows = sum(item.rows for _, item in answered) + sum(item.rows for _, item in labels)
        self._frames.append(_Frame(self._sequence, rows, size, data))


@dataclass(frozen=True)
class _Frame:
    sequence: int
    rows: int
    size: int
    data: bytes


@dataclass
class _Outcome:
    """What became of a try to write: rows, their size in bytes, and the error that ended it."""

    written: int = 0
    dropped: int = 0
    size: int = 0
    error: OSError | None = None
