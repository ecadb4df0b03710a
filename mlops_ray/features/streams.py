"""A view as a stream: the rows of its source in order of arrival become its feature rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import Source
from mlops_ray.features.columns import INSTANT, NO_TIME, encode, instants, key_columns, numbers
from mlops_ray.features.definitions import ViewDefinition
from mlops_ray.features.tiles import (
    Cells,
    Rows,
    WindowPlan,
    boundaries_of,
    cells_of,
    expire,
    merge,
    no_cells,
    plan_of,
)
from mlops_ray.features.windows import emit

_START = np.iinfo(np.int64).min


@dataclass(frozen=True)
class FeatureRows:
    """Feature rows of one view: numbers of entities, times in µs, ``values`` and ``null`` [n, f]."""

    entity: NDArray[np.int64]
    event_us: NDArray[np.int64]
    created_us: NDArray[np.int64]
    values: NDArray[np.float64]
    null: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.entity)

    def take(self, rows: NDArray[np.int64]) -> FeatureRows:
        """Return some of the rows."""
        return FeatureRows(
            self.entity[rows],
            self.event_us[rows],
            self.created_us[rows],
            self.values[rows],
            self.null[rows],
        )

    @staticmethod
    def join(parts: Sequence[FeatureRows]) -> FeatureRows:
        """Return the rows of all parts, of which there is at least one."""
        return FeatureRows(
            np.concatenate([part.entity for part in parts]),
            np.concatenate([part.event_us for part in parts]),
            np.concatenate([part.created_us for part in parts]),
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.null for part in parts]),
        )

    def newest(self) -> FeatureRows:
        """Return the newest row of each entity, by (event time, created time)."""
        order = np.lexsort((self.created_us, self.event_us, self.entity))
        last = np.append(self.entity[order][1:] != self.entity[order][:-1], True)
        return self.take(order[last])


@dataclass(frozen=True)
class SourceRows:
    """A source's rows as a view sees them, in order of arrival; ``keys`` are the entities by number."""

    rows: Rows
    keys: tuple[pa.Array, ...]

    @cached_property
    def key_arrays(self) -> tuple[NDArray[Any], ...]:
        """The entities' key columns in numpy."""
        return tuple(values.to_numpy(zero_copy_only=False) for values in self.keys)

    def between(self, after_us: int, upto_us: int) -> slice:
        """Return where the rows are that arrive in (after, upto]."""
        start, stop = np.searchsorted(self.rows.arrival_us, [after_us, upto_us], side="right")
        return slice(int(start), int(stop))

    def count(self, after_us: int, upto_us: int) -> int:
        """Return how many rows arrive in (after, upto]."""
        span = self.between(after_us, upto_us)
        return max(0, int(span.stop) - int(span.start))


class Stream(Protocol):
    """One view on its way through time."""

    definition: ViewDefinition
    source: SourceRows

    @property
    def cursor_us(self) -> int:
        """Up to where the view's source rows have been taken."""

    def waiting(self, until_us: int) -> int:
        """Return how many source rows the next advance to ``until_us`` would take."""

    def advance(self, until_us: int) -> FeatureRows:
        """Return the feature rows of the source rows that arrive in (cursor, until]."""


def open_stream(
    definition: ViewDefinition, source: Source, table: pa.Table, cursor_us: int | None
) -> Stream:
    """Return the stream of a view over all rows of its source, from ``cursor_us`` on.

    Raises:
        SchemaError: The table lacks a column that the view needs, or it has the wrong type.
    """
    start_us = _START if cursor_us is None else cursor_us
    where = f"features.views.{definition.name}"
    if not definition.view.windows:
        rows = source_rows(definition, source, table, definition.view.columns)
        return PlainStream(definition, rows, start_us)
    plan = plan_of(definition.view, where)
    rows = source_rows(definition, source, table, plan.columns)
    return WindowStream(definition, rows, start_us, plan)


def source_rows(
    definition: ViewDefinition, source: Source, table: pa.Table, columns: Sequence[str]
) -> SourceRows:
    """Return the rows that have a key, an event time and a time of availability, as numbers."""
    where = f"features.views.{definition.name}"
    entity, keys = encode(key_columns(table, definition.keys, where))
    event = instants(table, definition.view.event_time, f"{where}.event_time")
    available = instants(table, source.available_at, f"features.sources.{definition.view.source}")
    values = np.empty((len(columns), len(entity)))
    valid = np.empty(values.shape, np.bool_)
    for place, name in enumerate(columns):
        values[place], valid[place] = numbers(table, name, where)
    usable = np.flatnonzero((entity >= 0) & (event != NO_TIME) & (available != NO_TIME))
    arrival = np.maximum(event, available)
    order = usable[np.lexsort((available[usable], arrival[usable]))]
    return SourceRows(Rows(entity, event, arrival, values, valid).take(order), tuple(keys))


class PlainStream:
    """A view without windows: each source row is a feature row.

    A row's created time is the moment from which on it may be used: the later of its event time and
    its availability. Of rows with the same entity and times, the last of the source stays.
    """

    def __init__(self, definition: ViewDefinition, source: SourceRows, cursor_us: int) -> None:
        self.definition = definition
        self.source = source
        self._cursor_us = cursor_us

    @property
    def cursor_us(self) -> int:
        """Up to where the view's source rows have been taken."""
        return self._cursor_us

    def waiting(self, until_us: int) -> int:
        """Return how many source rows the next advance to ``until_us`` would take."""
        return self.source.count(self.cursor_us, until_us)

    def advance(self, until_us: int) -> FeatureRows:
        """Return the feature rows of the source rows that arrive in (cursor, until]."""
        rows = self.source.rows.take(self.source.between(self.cursor_us, until_us))
        self._cursor_us = max(self._cursor_us, until_us)
        order = np.lexsort((rows.event_us, rows.entity, rows.arrival_us))
        rows = rows.take(order)
        same = (
            (rows.entity[1:] == rows.entity[:-1])
            & (rows.event_us[1:] == rows.event_us[:-1])
            & (rows.arrival_us[1:] == rows.arrival_us[:-1])
        )
        rows = rows.take(np.append(~same, True)[: len(rows)])
        null = np.ascontiguousarray(~rows.valid.T)
        values = np.ascontiguousarray(rows.values.T)
        return FeatureRows(rows.entity, rows.event_us, rows.arrival_us, values, null)


class WindowStream:
    """A view with windows: keeps the cells of the longest window, and nothing else.

    The cells are a pure function of the source rows up to the cursor, so they are made anew at the
    first advance after a start.
    """

    def __init__(
        self, definition: ViewDefinition, source: SourceRows, cursor_us: int, plan: WindowPlan
    ) -> None:
        self.definition = definition
        self.source = source
        self.plan = plan
        self._tile = _NO_TILE if cursor_us == _START else cursor_us // plan.every_us
        self._cells: Cells | None = None
        self._expired_to = self._tile

    @property
    def cursor_us(self) -> int:
        """The last boundary that is done."""
        return _START if self._tile == _NO_TILE else self._tile * self.plan.every_us

    def waiting(self, until_us: int) -> int:
        """Return how many source rows the next advance to ``until_us`` would take."""
        return self.source.count(self.cursor_us, self._floor_us(until_us))

    def advance(self, until_us: int) -> FeatureRows:
        """Return the feature rows of the boundaries in (cursor, until]."""
        upto = until_us // self.plan.every_us
        if upto <= self._tile:
            return self._feature_rows(*_NOTHING)
        span = self.source.between(self.cursor_us, self._floor_us(until_us))
        fresh = cells_of(self.source.rows.take(span), self.plan)
        cells = merge(self._current(), fresh)
        entity, boundary = boundaries_of(fresh, self._tile, upto)
        rows = self._feature_rows(entity, boundary, cells)
        self._cells, self._tile = cells, upto
        self._forget()
        return rows

    def history(self, until_us: int) -> Rows:
        """Return all rows that decide the boundaries in (cursor, until], older ones among them."""
        rows = self.source.rows.take(
            slice(0, self.source.between(0, self._floor_us(until_us)).stop)
        )
        if self._tile == _NO_TILE:
            return rows
        return rows.take(self.plan.tile(rows.event_us) > self._tile + 1 - self.plan.span)

    def passing(self, until_us: int) -> tuple[int, int]:
        """Return the boundaries in (cursor, until], as tile numbers (after, upto]."""
        return self._tile, until_us // self.plan.every_us

    def skip(self, until_us: int) -> None:
        """Move the cursor: the feature rows up to there were made elsewhere."""
        self._tile = until_us // self.plan.every_us
        self._cells = None

    def _current(self) -> Cells:
        if self._cells is None:
            self._cells = no_cells(self.plan)
            if self._tile != _NO_TILE:
                self._cells = cells_of(self.history(self.cursor_us), self.plan)
            self._expired_to = self._tile
        return self._cells

    def _forget(self) -> None:
        """Drop expired cells now and then: each time would cost more than carrying them along."""
        if self._cells is not None and self._tile - self._expired_to >= max(1, self.plan.span // 8):
            self._cells = expire(self._cells, self._tile + 2 - self.plan.span)
            self._expired_to = self._tile

    def _feature_rows(
        self, entity: NDArray[np.int64], boundary: NDArray[np.int64], cells: Cells | None = None
    ) -> FeatureRows:
        emitted = emit(cells or no_cells(self.plan), entity, boundary, self.plan)
        times = emitted.boundary_us
        return FeatureRows(emitted.entity, times, times, emitted.values, emitted.null)

    def _floor_us(self, until_us: int) -> int:
        return until_us // self.plan.every_us * self.plan.every_us


_NO_TILE = np.iinfo(np.int64).min // 2
_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int64))


def table_of(definition: ViewDefinition, source: SourceRows, rows: FeatureRows) -> pa.Table:
    """Return feature rows as a table of the view's schema."""
    entity = pa.array(rows.entity)
    columns = [values.take(entity) for values in source.keys]
    columns += [pa.array(times).cast(INSTANT) for times in (rows.event_us, rows.created_us)]
    columns += [
        pa.array(np.ascontiguousarray(rows.values[:, at]), mask=rows.null[:, at])
        for at in range(len(definition.feature_names))
    ]
    return pa.table(columns, schema=definition.schema)
