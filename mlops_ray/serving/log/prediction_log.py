"""What a replica has answered and been told, kept until it is written and sent.

The request path only appends to lists. A flush turns them into Arrow files on disk and a delta for
the monitor, in a thread. What a crash can lose is what came in since the last flush.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from mlops_ray.config.features import RequestField
from mlops_ray.features.definitions import ARROW_TYPES
from mlops_ray.metadata.delta import LABEL_SCHEMA, Delta, prediction_schema
from mlops_ray.metadata.files import sync
from mlops_ray.metadata.profile import Profile
from mlops_ray.serving.formats.request import Feedback
from mlops_ray.serving.models.loading import Columns, ModelSet

logger = logging.getLogger(__name__)

MAX_PENDING_ROWS = 500_000
"""Rows kept in memory while the disk refuses them; beyond, the oldest are dropped and counted."""

Sink = Callable[[Delta, bool], None]
"""Takes a delta to the monitor; with True, returns only after the monitor has taken it in."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered request: ``times`` datetime64[us], ``scores`` float64, all of [n].

    ``inputs`` are what the request brought, ``columns`` the features made of it.
    """

    models: ModelSet
    ids: list[str]
    times: NDArray[np.datetime64]
    scores: NDArray[np.float64]
    inputs: Columns
    columns: Columns


class PredictionLog:
    """The log of one replica, in ``folder``'s ``predictions`` and ``labels``.

    Files are named ``<milliseconds>-<replica>-<number>.arrow``, so that their names sort by time;
    each appears whole or not at all. Predictions have ``delta.prediction_schema`` and the structs
    ``features`` and ``inputs``; labels ``delta.LABEL_SCHEMA``. After a failed flush the same row may
    stand in two files. ``add`` and ``add_labels`` belong to the event loop's thread.

    Args:
        folder: The project's folder of predictions.
        replica: The name of this replica, unlike any other's.
        inputs: The fields of a request and their types.
        sink: Takes what is written to the monitor.
    """

    def __init__(
        self,
        folder: Path,
        replica: str,
        inputs: Mapping[str, RequestField],
        sink: Sink | None = None,
    ) -> None:
        self._folder = folder
        self._replica = replica
        self._inputs = {name: ARROW_TYPES[field.dtype] for name, field in inputs.items()}
        self._sink = sink
        self._answered: list[Answered] = []
        self._labels: list[Feedback] = []
        self._rows = 0
        self._parts = 0
        self._flushing = asyncio.Lock()
        self.dropped_rows = 0

    @property
    def pending_rows(self) -> int:
        """Rows and labels that are not on disk yet."""
        return self._rows

    def add(self, answered: Answered) -> None:
        """Keep one answered request."""
        self._answered.append(answered)
        self._rows += len(answered.ids)

    def add_labels(self, feedback: Feedback) -> None:
        """Keep labels. The same label may come again: readers take the last one of an id."""
        self._labels.append(feedback)
        self._rows += len(feedback.ids)

    async def flush(self, *, confirm: bool = False) -> int:
        """Write and send all that has been added; return the number of rows and labels written.

        With ``confirm``, the monitor (if there is one) has taken them in on return. An OSError of
        the disk is raised after the rows are put back: nothing is lost, the next flush tries again.
        """
        async with self._flushing:
            answered, self._answered = self._answered, []
            labels, self._labels = self._labels, []
            rows, self._rows = self._rows, 0
            try:
                await asyncio.to_thread(self._write, answered, labels, confirm)
            except OSError:
                self._put_back(answered, labels, rows)
                raise
            return rows

    def _put_back(self, answered: list[Answered], labels: list[Feedback], rows: int) -> None:
        self._answered = answered + self._answered
        self._labels = labels + self._labels
        self._rows += rows
        while self._rows > MAX_PENDING_ROWS and self._answered:
            lost = len(self._answered.pop(0).ids)
            self._rows -= lost
            self.dropped_rows += lost

    def _write(self, answered: list[Answered], labels: list[Feedback], confirm: bool) -> None:
        deltas = [self._write_answered(group) for group in _by_models(answered)]
        if labels:
            deltas = deltas or [_empty_delta(self._next_part())]
            table = _label_table(labels)
            deltas[0] = replace(deltas[0], labels=table)
            _write_part(self._folder / "labels" / deltas[0].part, table)
        # Only when every row is safe on disk may the monitor count any of them.
        for delta in deltas:
            self._send(delta, confirm)

    def _write_answered(self, group: list[Answered]) -> Delta:
        part = self._next_part()
        models = group[0].models
        times = np.concatenate([item.times for item in group])
        scores = np.concatenate([item.scores for item in group])
        columns = _chained([item.columns for item in group])
        inputs = _chained([item.inputs for item in group])
        ids = [identifier for item in group for identifier in item.ids]
        predictions = _prediction_table(models, ids, times, scores, columns)
        _write_part(
            self._folder / "predictions" / part,
            predictions.append_column("features", _struct(columns, {})).append_column(
                "inputs", _struct(inputs, self._inputs)
            ),
        )
        return Delta(
            version=models.answer.spec.version,
            reference_digest=models.answer.reference_digest,
            buckets=_buckets(models, times, columns),
            predictions=predictions,
            labels=LABEL_SCHEMA.empty_table(),
            part=part,
        )

    def _next_part(self) -> str:
        self._parts += 1
        return f"{time.time_ns() // 1_000_000:013d}-{self._replica}-{self._parts:06d}.arrow"

    def _send(self, delta: Delta, confirm: bool) -> None:
        if self._sink is None:
            return
        try:
            self._sink(delta, confirm)
        except Exception:
            logger.exception("the monitor did not take a delta; its rows are in %s", delta.part)


def _by_models(answered: list[Answered]) -> list[list[Answered]]:
    groups: dict[int, list[Answered]] = {}
    for item in answered:
        groups.setdefault(id(item.models), []).append(item)
    return list(groups.values())


def _prediction_table(
    models: ModelSet,
    ids: list[str],
    times: NDArray[np.datetime64],
    scores: NDArray[np.float64],
    columns: Columns,
) -> pa.Table:
    shadows = models.shadow_scores(columns, scores)
    arrays = [
        pa.array(ids, pa.string()),
        pa.array(times.astype("datetime64[us]").view(np.int64)).cast(pa.timestamp("us", tz="UTC")),
        pa.array(scores),
        pa.array(np.full(len(ids), models.answer.spec.version, dtype=np.int64)),
        *(pa.array(values, from_pandas=True) for values in shadows.values()),
    ]
    return pa.Table.from_arrays(arrays, schema=prediction_schema(tuple(shadows)))


def _chained(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _struct(columns: Columns, types: Mapping[str, pa.DataType]) -> pa.StructArray:
    """The columns as one struct column, so that no name can clash; NaN becomes null."""
    arrays = [
        pa.array(values, types.get(name), from_pandas=True) for name, values in columns.items()
    ]
    return pa.StructArray.from_arrays(arrays, names=list(columns))


def _buckets(
    models: ModelSet, times: NDArray[np.datetime64], columns: Columns
) -> dict[str, Profile]:
    """Counts of the features that the answering model reads, by UTC day of the prediction time."""
    days = times.astype("datetime64[D]")
    read = {name: columns[name] for name in models.answer.features}
    buckets = {}
    for day in np.unique(days):
        chosen = days == day
        rows = {name: values[chosen] for name, values in read.items()}
        buckets[str(day)] = models.answer.reference.bin(rows)
    return buckets


def _label_table(labels: list[Feedback]) -> pa.Table:
    known_at = np.array([at for item in labels for at in item.known_at_us], dtype=np.int64)
    arrays = [
        pa.array([identifier for item in labels for identifier in item.ids], pa.string()),
        pa.array([label for item in labels for label in item.labels], pa.int8()),
        pa.array(known_at).cast(pa.timestamp("us", tz="UTC")),
    ]
    return pa.Table.from_arrays(arrays, schema=LABEL_SCHEMA)


def _empty_delta(part: str) -> Delta:
    return Delta(
        version=0,
        reference_digest="",
        buckets={},
        predictions=prediction_schema().empty_table(),
        labels=LABEL_SCHEMA.empty_table(),
        part=part,
    )


def _write_part(path: Path, table: pa.Table) -> None:
    """Write an Arrow IPC file that is there whole, or not at all, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        with ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    sync(path.parent)
