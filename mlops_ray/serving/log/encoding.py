"""From what was answered and told to a frame: columns joined, counted, sampled, redacted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import RequestField
from mlops_ray.config.serving import PredictionLog as Settings
from mlops_ray.features.definitions import ARROW_TYPES
from mlops_ray.metadata.delta import prediction_schema
from mlops_ray.metadata.prediction_log.frames import Counts, encode
from mlops_ray.metadata.prediction_log.layout import INSTANT, LABELS, PREDICTIONS, SHADOW
from mlops_ray.serving.formats.feedback import Feedback
from mlops_ray.serving.log.redaction import Redaction, chosen
from mlops_ray.serving.log.shadows import Shadows
from mlops_ray.serving.models.loading import Columns, LoadedModel, ModelSet

_PAUSE_S = 50e-6
_PATIENCE_S = {"interval": 1.0, "answered": 0.1}
"""How long a write waits for models in shadow, by durability: with the one nobody waits for it."""

_MOST_DAYS = 64
_LONG_AGO = "0001-01-01"


@dataclass(slots=True)
class Answered:
    """Rows that one model has answered: ``times`` datetime64[us], ``scores`` float64, all of [n].

    Args:
        models: The models that were there; those in shadow are asked too. None: there were no others.
        model: The one of them that answered.
        route: The alias under which it did.
        ids: Of the predictions.
        times: Of the requests, as they say themselves.
        scores: What was answered.
        inputs: What the requests brought.
        columns: The features made of it.
        latency_us: How long it took to answer, int64 [n].
    """

    models: ModelSet | None
    model: LoadedModel
    route: str
    ids: list[str]
    times: NDArray[np.datetime64]
    scores: NDArray[np.float64]
    inputs: Columns
    columns: Columns
    latency_us: NDArray[np.int64]


Received = tuple[int, Answered]
"""When an answer was added, in ns since 1970, and the answer."""

Told = tuple[int, Feedback]
"""When labels were added, in ns since 1970, and the labels."""


@dataclass
class _Rows:
    """Answered rows of one model as long columns; ``name`` where it is not the endpoint's own.

    Of those, the monitor wants nothing.
    """

    name: str | None
    model: LoadedModel
    ids: list[str]
    times: NDArray[np.datetime64]
    scores: NDArray[np.float64]
    inputs: Columns
    columns: Columns
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
        for group in _groups(answered):
            rows = self._rows(group)
            if rows.name is None:
                _count(counts, rows)
            self._split(rows, kept, others)
        return encode(
            sequence,
            _joined(kept),
            _joined(others),
            _label_table(labels) if labels else None,
            counts,
        )

    def _rows(self, group: list[Received]) -> _Rows:
        items = [item for _, item in group]
        models, model = items[0].models, items[0].model
        ids = [identifier for item in items for identifier in item.ids]
        sizes = [len(item.ids) for item in items]
        times = np.concatenate([item.times for item in items]).astype("datetime64[us]")
        scores = np.concatenate([item.scores for item in items])
        columns = _chained([item.columns for item in items])
        shadows = self._shadows.scores(models.shadows, model, columns, scores) if models else {}
        schema = prediction_schema(tuple(shadows))
        arrays = [
            pa.array(ids, pa.string()),
            _instants(times.view(np.int64)),
            pa.array(scores, pa.float64()),
            pa.array(np.full(len(ids), model.spec.version, dtype=np.int64)),
            *shadows.values(),
        ]
        received_us = np.array([received_ns // 1000 for received_ns, _ in group], dtype=np.int64)
        beside = {
            "received": _instants(np.repeat(received_us, sizes)),
            "route": pa.array(_repeated([item.route for item in items], sizes), pa.string()),
            "latency_us": pa.array(np.concatenate([item.latency_us for item in items]), pa.int64()),
        }
        return _Rows(
            models.name if models else None,
            model,
            ids,
            times,
            scores,
            _chained([item.inputs for item in items]),
            columns,
            pa.Table.from_arrays(arrays, schema=schema),
            pa.table(beside),
        )

    def _split(self, rows: _Rows, kept: list[pa.Table], others: list[pa.Table]) -> None:
        choice = chosen(rows.ids, self._sample)
        if not choice.all() and rows.name is None:
            others.append(rows.slim.filter(pa.array(~choice)))
        if choice.any():
            table = self._whole(rows)
            kept.append(table if choice.all() else table.filter(pa.array(choice)))

    def _whole(self, rows: _Rows) -> pa.Table:
        count = len(rows.ids)
        columns = {name: rows.slim[name] for name in rows.slim.column_names}
        columns |= {name: rows.beside[name] for name in rows.beside.column_names}
        columns["sample"] = pa.array(np.full(count, self._sample))
        columns["model"] = pa.array([rows.name] * count, pa.string())
        shadows = [name for name in rows.slim.column_names if name.startswith(SHADOW)]
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


def _groups(answered: Iterable[Received]) -> list[list[Received]]:
    groups: dict[tuple[int, int], list[Received]] = {}
    for item in answered:
        groups.setdefault((id(item[1].models), id(item[1].model)), []).append(item)
    return list(groups.values())


def _count(total: Counts, rows: _Rows) -> None:
    """Add the counts of the features that the answering model reads, by UTC day.

    Clients choose the days: beyond the ``_MOST_DAYS`` that have most rows, all count under a day that
    is in no window, so that the work for a row is bounded.
    """
    model = rows.model
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
        part = read if whole else {name: values[chosen_rows] for name, values in read.items()}
        profile = model.reference.bin(part)
        known[str(day)] = known[str(day)].merge(profile) if str(day) in known else profile


def _chained(parts: list[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for name in parts[0]:
        joined[name] = np.concatenate([part[name] for part in parts])
        # Lets a thread that answers requests have the interpreter between any two columns.
        time.sleep(_PAUSE_S)
    return joined


def _repeated(values: list[str], sizes: list[int]) -> list[str]:
    return [value for value, size in zip(values, sizes, strict=True) for _ in range(size)]


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
