"""From what was answered and told to a frame: columns joined, counted, sampled, redacted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import RequestField
from mlops_ray.config.serving import PredictionLog as Settings
from mlops_ray.features.definitions import ARROW_TYPES
from mlops_ray.features.matrix import by_column, join, take
from mlops_ray.metadata.delta import prediction_schema
from mlops_ray.metadata.prediction_log.frames import Counts, encode
from mlops_ray.metadata.prediction_log.layout import INSTANT, LABELS, PREDICTIONS, SHADOW
from mlops_ray.serving.formats.feedback import Feedback
from mlops_ray.serving.log.redaction import Redaction, chosen
from mlops_ray.serving.log.shadows import Shadows
from mlops_ray.serving.models.loading import Columns, LoadedModel, ModelSet

_PATIENCE_S = {"interval": 1.0, "answered": 0.1}
"""How long a write waits for models in shadow, by durability: with the one nobody waits for it."""

_MOST_DAYS = 64
_LONG_AGO = "0001-01-01"


class Part(NamedTuple):
    """Rows that ``model`` has answered, None for all of them, under the alias ``route``."""

    model: LoadedModel
    rows: NDArray[np.int64] | None
    route: str


@dataclass(slots=True)
class Answered:
    """Answered rows: ``times`` datetime64[us], ``scores`` float64, all of [n].

    Args:
        models: The models that were there; those in shadow are asked too. None: there were no others.
        parts: Who answered which rows; each row is in one of them.
        ids: Of the predictions.
        times: Of the requests, as they say themselves.
        scores: What was answered.
        inputs: What the requests brought.
        columns: The features made of it.
        latency_us: How long it took to answer, int64 [n].
    """

    models: ModelSet | None
    parts: list[Part]
    ids: list[str]
    times: NDArray[np.datetime64]
    scores: NDArray[np.float64]
    inputs: Columns
    columns: Columns
    latency_us: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.ids)


Received = tuple[int, Answered]
"""When an answer was added, in ns since 1970, and the answer."""

Told = tuple[int, Feedback]
"""When labels were added, in ns since 1970, and the labels."""


@dataclass
class _Rows:
    """Answered rows as long columns."""

    models: ModelSet | None
    ids: list[str]
    times: NDArray[np.datetime64]
    scores: NDArray[np.float64]
    inputs: Columns
    columns: Columns
    latency_us: NDArray[np.int64]
    received_us: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> _Rows:
        return _Rows(
            self.models,
            [self.ids[row] for row in rows.tolist()],
            self.times[rows],
            self.scores[rows],
            take(self.inputs, rows),
            take(self.columns, rows),
            self.latency_us[rows],
            self.received_us[rows],
        )


@dataclass
class _Kept:
    """Rows that one model has answered.

    ``slim`` are the columns of ``delta.prediction_schema``, ``beside`` the others. ``name`` is the
    model's where it is not the endpoint's own; of those, the monitor wants nothing.
    """

    rows: _Rows
    model: LoadedModel
    name: str | None
    slim: pa.Table
    beside: pa.Table


class Encoding:
    """Makes frames of a replica's answers and labels; called by the thread that writes."""

    def __init__(
        self, inputs: Mapping[str, RequestField], settings: Settings, redaction: Redaction
    ) -> None:
        self._types = {name: ARROW_TYPES[field.dtype] for name, field in inputs.items()}
        self._sample = settings.sample
        self._redaction = redaction
        self._shadows = Shadows(_PATIENCE_S[settings.durability])

    def frame(
        self,
        sequence: int,
        answered: Sequence[Received],
        labels: Sequence[Told],
    ) -> bytes:
        """Return the frame of these answers and labels."""
        kept: list[pa.Table] = []
        others: list[pa.Table] = []
        counts: Counts = {}
        for items in _of_one_set(answered):
            whole = _whole(items)
            for model, route, places in _parts(items):
                rows = whole if places is None else whole.take(places)
                part = self._kept(rows, model, route)
                if part.name is None:
                    _count(counts, part)
                self._split(part, kept, others)
        return encode(
            sequence,
            _joined(kept),
            _joined(others),
            _label_table(labels) if labels else None,
            counts,
        )

    def _kept(self, rows: _Rows, model: LoadedModel, route: str) -> _Kept:
        models, count = rows.models, len(rows.ids)
        shadows: dict[str, pa.Array] = {}
        if models is not None:
            shadows = self._shadows.scores(models.shadows, model, rows.columns, rows.scores)
        arrays = [
            pa.array(rows.ids, pa.string()),
            _instants(rows.times.view(np.int64)),
            pa.array(rows.scores, pa.float64()),
            pa.array(np.full(count, model.spec.version, dtype=np.int64)),
            *shadows.values(),
        ]
        beside = {
            "received": _instants(rows.received_us),
            "route": pa.repeat(pa.scalar(route), count),
            "latency_us": pa.array(rows.latency_us, pa.int64()),
        }
        return _Kept(
            rows,
            model,
            models.name if models else None,
            pa.Table.from_arrays(arrays, schema=prediction_schema(tuple(shadows))),
            pa.table(beside),
        )

    def _split(self, part: _Kept, kept: list[pa.Table], others: list[pa.Table]) -> None:
        choice = chosen(part.rows.ids, self._sample)
        if not choice.all() and part.name is None:
            others.append(part.slim.filter(pa.array(~choice)))
        if choice.any():
            table = self._whole(part)
            kept.append(table if choice.all() else table.filter(pa.array(choice)))

    def _whole(self, part: _Kept) -> pa.Table:
        rows, count = part.rows, len(part.rows.ids)
        columns = {name: part.slim[name] for name in part.slim.column_names}
        columns |= {name: part.beside[name] for name in part.beside.column_names}
        columns["sample"] = pa.array(np.full(count, self._sample))
        columns["model"] = pa.array([part.name] * count, pa.string())
        shadows = [name for name in part.slim.column_names if name.startswith(SHADOW)]
        table = pa.table({name: columns[name] for name in [*PREDICTIONS.names, *shadows]})
        for name, values, types in (
            ("features", rows.columns, {}),
            ("inputs", rows.inputs, self._types),
        ):
            if values:
                table = table.append_column(name, self._struct(values, types))
        return table

    def _struct(self, columns: Columns, types: Mapping[str, pa.DataType]) -> pa.StructArray:
        """The columns as one struct, so that no name can clash; NaN becomes null."""
        arrays = [
            self._redaction.column(name, values)
            if name in self._redaction
            else _array(values, types.get(name))
            for name, values in columns.items()
        ]
        return pa.StructArray.from_arrays(arrays, names=list(columns))


def _of_one_set(answered: Iterable[Received]) -> list[list[Received]]:
    groups: dict[int, list[Received]] = {}
    for item in answered:
        groups.setdefault(id(item[1].models), []).append(item)
    return list(groups.values())


def _whole(items: Sequence[Received]) -> _Rows:
    """Return the rows of all items, one after the other."""
    all_of = [item for _, item in items]
    received_us = np.array([received_ns // 1000 for received_ns, _ in items], dtype=np.int64)
    return _Rows(
        all_of[0].models,
        [identifier for item in all_of for identifier in item.ids],
        np.concatenate([item.times for item in all_of]).astype("datetime64[us]"),
        np.concatenate([item.scores for item in all_of]),
        join([item.inputs for item in all_of]),
        by_column(join([item.columns for item in all_of])),
        np.concatenate([item.latency_us for item in all_of]),
        np.repeat(received_us, [len(item.ids) for item in all_of]),
    )


def _parts(items: Sequence[Received]) -> list[tuple[LoadedModel, str, NDArray[np.int64] | None]]:
    """Return who answered which rows of ``_whole``, None for all of them."""
    found: dict[tuple[int, str], tuple[LoadedModel, list[NDArray[np.int64]]]] = {}
    start = 0
    for _, item in items:
        stop = start + len(item.ids)
        for part in item.parts:
            known = found.setdefault((id(part.model), part.route), (part.model, []))
            rows = np.arange(start, stop) if part.rows is None else part.rows + start
            known[1].append(rows)
        start = stop
    whole = [(model, route, np.concatenate(rows)) for (_, route), (model, rows) in found.items()]
    return [(m, route, None if len(rows) == start else rows) for m, route, rows in whole]


def _count(total: Counts, part: _Kept) -> None:
    """Add the counts of the features that the answering model reads, by UTC day.

    Clients choose the days: beyond the ``_MOST_DAYS`` that have most rows, all count under a day that
    is in no window, so that the work for a row is bounded.
    """
    model, rows = part.model, part.rows
    known = total.setdefault(model.reference_digest, {})
    # A graph may make features of its own; those are in no request's columns.
    read = {name: rows.columns[name] for name in model.features if name in rows.columns}
    days = rows.times.astype("datetime64[D]")
    found, sizes = np.unique(days, return_counts=True)
    if len(found) > _MOST_DAYS:
        most = found[np.argsort(sizes, kind="stable")[-_MOST_DAYS:]]
        days = np.where(np.isin(days, most), days, np.datetime64(_LONG_AGO))
        found = np.unique(days)
    for day in found:
        chosen_rows = days == day
        whole = bool(chosen_rows.all())
        counted = read if whole else take(read, chosen_rows)
        profile = model.reference.bin(counted)
        known[str(day)] = known[str(day)].merge(profile) if str(day) in known else profile


def _instants(micros: NDArray[np.int64]) -> pa.Array:
    return pa.array(micros, pa.int64()).cast(INSTANT)


def _array(values: NDArray[Any], kind: pa.DataType | None) -> pa.Array:
    if values.dtype.kind == "M":
        return pa.array(values.astype("datetime64[us]")).cast(INSTANT)
    if kind is None and values.dtype.kind == "O":
        kind = pa.string()
    return pa.array(values, kind, from_pandas=True)


def _joined(tables: list[pa.Table]) -> pa.Table | None:
    return pa.concat_tables(tables, promote_options="permissive") if tables else None


def _label_table(labels: Sequence[Told]) -> pa.Table:
    sizes = [len(item.ids) for _, item in labels]
    received_us = np.array([received_ns // 1000 for received_ns, _ in labels], dtype=np.int64)
    known_at_us = np.array([at for _, item in labels for at in item.known_at_us], dtype=np.int64)
    arrays = [
        pa.array([identifier for _, item in labels for identifier in item.ids], pa.string()),
        pa.array([label for _, item in labels for label in item.labels], pa.int8()),
        _instants(known_at_us),
        _instants(np.repeat(received_us, sizes)),
    ]
    return pa.Table.from_arrays(arrays, schema=LABELS)
