"""A table of history as the requests and labels that a client would have sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.config.features import Labels
from mlops_ray.errors import SchemaError
from mlops_ray.monitoring.labels import TIMESTAMP

LABELS_PER_REQUEST = 500

_ISO = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Request:
    """One prediction request: the rows of one instant, by input name, and their ids."""

    time: datetime
    ids: list[str]
    rows: list[dict[str, Any]]


class Traffic:
    """The rows of ``table`` with a prediction time in [start, end), in the order of time and id.

    Args:
        table: Has the service's inputs and the columns that ``labels`` names.
        inputs: What a request holds.
        labels: Which columns hold id, prediction time, label and the moment when it is known.
        start: First prediction time.
        end: End of the prediction times, exclusive.

    Raises:
        SchemaError: A column is missing.
    """

    def __init__(
        self,
        table: pa.Table,
        inputs: Sequence[str],
        labels: Labels,
        start: datetime,
        end: datetime,
    ) -> None:
        needed = [*inputs, labels.id, labels.time, labels.label, labels.known_at]
        missing = [name for name in needed if name not in table.column_names]
        if missing:
            raise SchemaError(
                f"the table to replay lacks {', '.join(missing)}",
                where=f"source {labels.source}",
                fix=f"it has: {', '.join(table.column_names)}",
            )
        time = table[labels.time].cast(TIMESTAMP)
        chosen = pc.and_(pc.greater_equal(time, _at(start)), pc.less(time, _at(end)))
        table = table.select(list(dict.fromkeys(needed))).filter(chosen)
        table = table.sort_by([(labels.time, "ascending"), (labels.id, "ascending")])
        self._outcomes = _outcomes(table, labels)
        self._requests = _json_ready(table.select(list(inputs)))
        self._time_us = _microseconds(self._outcomes["time"])
        self._due_us, self._due_order = _due(self._outcomes, self._time_us)

    @property
    def rows(self) -> int:
        """How many rows there are to predict."""
        return len(self._outcomes)

    def requests(self, since: datetime, until: datetime) -> list[Request]:
        """Return one request for each prediction time in [since, until), in order."""
        first, last = np.searchsorted(self._time_us, [_us(since), _us(until)])
        if first == last:
            return []
        rows = self._requests.slice(first, last - first).to_pylist()
        part = self._outcomes.slice(first, last - first)
        ids, times = part["id"].to_pylist(), part["time"].to_pylist()
        cuts = (np.flatnonzero(np.diff(self._time_us[first:last])) + 1).tolist()
        bounds = [0, *cuts, len(rows)]
        return [Request(times[a], ids[a:b], rows[a:b]) for a, b in pairwise(bounds)]

    def labels(self, since: datetime, until: datetime) -> list[list[dict[str, Any]]]:
        """Return the labels that became known in (since, until], in batches for one request each.

        A label that was known before its prediction comes right after it.
        """
        first, last = np.searchsorted(self._due_us, [_us(since), _us(until)], side="right")
        known = self._outcomes.take(self._due_order[first:last])
        entries = [
            {"id": key, "label": int(label), "known_at": at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
            for key, label, at in zip(
                *(known[name].to_pylist() for name in ("id", "label", "known_at")), strict=True
            )
        ]
        return [
            entries[at : at + LABELS_PER_REQUEST]
            for at in range(0, len(entries), LABELS_PER_REQUEST)
        ]

    def outcomes(self, since: datetime, until: datetime) -> pa.Table:
        """Return id, time, label and known_at of the rows with time in [since, until).

        ``label`` is float64; both it and ``known_at`` are null for rows that never get a label.
        """
        first, last = np.searchsorted(self._time_us, [_us(since), _us(until)])
        return self._outcomes.slice(first, last - first)


def _outcomes(table: pa.Table, labels: Labels) -> pa.Table:
    known = pc.and_(pc.is_valid(table[labels.label]), pc.is_valid(table[labels.known_at]))
    label = table[labels.label].cast(pa.float64())
    known_at = table[labels.known_at].cast(TIMESTAMP)
    columns = {
        "id": table[labels.id].cast(pa.string()),
        "time": table[labels.time].cast(TIMESTAMP),
        "label": pc.if_else(known, label, pa.scalar(None, label.type)),
        "known_at": pc.if_else(known, known_at, pa.scalar(None, TIMESTAMP)),
    }
    return pa.table(columns).combine_chunks()


def _json_ready(table: pa.Table) -> pa.Table:
    """Write timestamps as ISO 8601 in UTC; leave the rest."""
    for place, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            moments = table[field.name].cast(TIMESTAMP)
            table = table.set_column(place, field.name, pc.strftime(moments, _ISO))
    return table.combine_chunks()


def _due(outcomes: pa.Table, time_us: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Return when each label is to be sent, sorted, and the rows in that order."""
    rows = np.flatnonzero(outcomes["label"].is_valid().to_numpy())
    known_us = _microseconds(outcomes["known_at"].take(rows))
    due_us = np.maximum(known_us, time_us[rows] + 1)
    order = np.argsort(due_us, kind="stable")
    return due_us[order], rows[order]


def _microseconds(column: pa.ChunkedArray) -> Any:
    return column.cast(pa.int64()).to_numpy()


def _us(moment: datetime) -> int:
    return int(_at(moment).value)


def _at(moment: datetime) -> pa.Scalar:
    return pa.scalar(moment, TIMESTAMP)
