"""Arrivals: rows of a source, or of another view, as a view takes them in.

A row *arrives* at the moment from which on it may be used: the latest of its event time, the time
from which on it was available, and, of an event, the time when it was received.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.config.features import DType, Features
from mlops_ray.features.columns import NO_TIME, column, instants, key_columns, numbers, wrong_type
from mlops_ray.features.definitions import ARROW_TYPES, CREATED_TIME, ViewDefinition, define
from mlops_ray.features.hyperloglog import codes_of
from mlops_ray.features.sources.events import RECEIVED_AT
from mlops_ray.features.window_plan import WindowPlan, plan_of

EVENT = "event us"
ARRIVAL = "arrival us"
AVAILABLE = "available us"

_BATCH_ROWS = 1 << 17


@dataclass(frozen=True)
class Origin:
    """What a view is made from: which columns say when, and where errors find them.

    ``received`` says that the rows are events, which are known here from ``received_at`` on.
    """

    definition: ViewDefinition
    plan: WindowPlan | None
    event_time: str
    available_at: str
    received: bool
    where: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, the keys first."""
        times = [self.event_time, self.available_at] + [RECEIVED_AT] * self.received
        if self.plan is None:
            values: Iterable[str] = self.definition.features
        else:
            values = (*self.plan.columns, *self.plan.hashed)
        return tuple(dict.fromkeys([*self.definition.keys, *times, *values]))


def origin_of(features: Features, name: str) -> Origin:
    """Return what a view is made from."""
    definition = define(features, name)
    view = definition.view
    plan = plan_of(view) if view.windows else None
    if view.source is None:
        available_at, received = CREATED_TIME, False
    else:
        source = features.sources[view.source]
        available_at = source.known_at
        received = source.streams
    where = f"features.views.{name}"
    return Origin(definition, plan, view.event_time, available_at, received, where)


def prepare(origin: Origin, table: pa.Table) -> pa.Table:
    """Return the rows that have a key, an event time and a time of availability.

    The columns are the keys, typed; ``EVENT`` and ``ARRIVAL``, int64 µs; then of a plain view
    ``AVAILABLE`` and the features, typed; of a windowed one the value columns as float64, and of
    hashed columns the codes of the values, uint16.

    Raises:
        SchemaError: The table lacks a column that the view needs, or it has the wrong type.
    """
    definition, where = origin.definition, origin.where
    keys = key_columns(table, definition.keys, where)
    event, available = _times(origin, table)
    columns: dict[str, Any] = dict(zip(definition.keys, keys, strict=True))
    columns |= {EVENT: event, ARRIVAL: np.maximum(event, available)}
    if origin.plan is None:
        columns[AVAILABLE] = available
        for name, dtype in definition.features.items():
            columns[name] = typed(table, name, dtype, where)
    else:
        for number, name in enumerate(origin.plan.columns):
            values, valid = numbers(table, name, where)
            columns[f"value {number}"] = pa.array(values, mask=~valid)
        for number, name in enumerate(origin.plan.hashed, len(origin.plan.columns)):
            hashed = column(table, name, where)
            columns[f"value {number}"] = pa.array(
                codes_of(hashed, f"{where}.{name}"), mask=_null(hashed)
            )
    usable = (event != NO_TIME) & (available != NO_TIME)
    for key in keys:
        usable &= ~_null(key)
    prepared = pa.table(columns)
    return prepared if usable.all() else prepared.filter(pa.array(usable))


def batches(origin: Origin, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Return the prepared rows of some tables, a bounded number at a time."""
    for table in tables:
        for start in range(0, max(table.num_rows, 1), _BATCH_ROWS):
            yield prepare(origin, table.slice(start, _BATCH_ROWS))


def arrivals(origin: Origin, table: pa.Table) -> Iterator[NDArray[np.int64]]:
    """Return when the rows of a table arrive, in µs, a bounded number at a time."""
    for start in range(0, table.num_rows, _BATCH_ROWS):
        event, available = _times(origin, table.slice(start, _BATCH_ROWS))
        usable = (event != NO_TIME) & (available != NO_TIME)
        yield np.maximum(event, available)[usable]


def needed(origin: Origin, prepared: pa.Table, after_us: int, upto_us: int | None) -> pa.Table:
    """Return the rows that decide what comes of the arrivals in (after, upto].

    Those are they, and of a windowed view the older ones that lie in a window of theirs.
    """
    arrival = prepared[ARRIVAL].to_numpy()
    if origin.plan is None:
        keep = arrival > after_us
    else:
        tile = after_us // origin.plan.every_us
        keep = arrival > tile * origin.plan.every_us
        keep |= origin.plan.tile(prepared[EVENT].to_numpy()) > tile + 1 - origin.plan.span
    if upto_us is not None:
        keep &= arrival <= upto_us
    return prepared if keep.all() else prepared.filter(pa.array(keep))


def typed(table: pa.Table, name: str, dtype: DType, where: str) -> pa.ChunkedArray:
    """Return a column in a feature's type, every value as it is: null is null, NaN is NaN.

    An int may become a float, a bool an int or a float, a date a timestamp; nothing else changes.

    Raises:
        SchemaError: No such column, or it has another type; an int is too large.
    """
    values = column(table, name, where)
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    if kind == ARROW_TYPES[dtype]:
        return values
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    fits = {
        "string": pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "int": whole,
        "float": whole or pa.types.is_floating(kind),
        "bool": pa.types.is_boolean(kind),
        "timestamp": pa.types.is_timestamp(kind) or pa.types.is_date(kind),
    }
    if not fits[dtype] and not pa.types.is_null(kind):
        expected = "a number" if dtype == "float" else dtype
        raise wrong_type(name, expected, kind, where)
    if pa.types.is_boolean(kind) and dtype != "bool":
        values = values.cast(pa.int8())
    try:
        return values.cast(ARROW_TYPES[dtype], safe=dtype == "int")
    except pa.ArrowException as error:
        raise wrong_type(name, f"{dtype} ({error})", kind, where) from error


def _times(origin: Origin, table: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    event = instants(table, origin.event_time, f"{origin.where}.event_time")
    available = instants(table, origin.available_at, f"{origin.where}: available_at")
    if origin.received and origin.available_at != RECEIVED_AT:
        received = instants(table, RECEIVED_AT, origin.where)
        known = available != NO_TIME
        available = np.where(known, np.maximum(available, received), NO_TIME)
    return event, available


def _null(values: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(pc.is_null(values).to_numpy(), np.bool_)
