"""A view as a stream: its rows in order of arrival become its feature rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.features.arrivals import ARRIVAL, AVAILABLE, EVENT, Origin
from mlops_ray.features.columns import INSTANT, encode
from mlops_ray.features.definitions import ViewDefinition
from mlops_ray.features.entities import Entities
from mlops_ray.features.tiles import Cells, boundaries_of, cells_of, expire, merge
from mlops_ray.features.window_plan import Rows, WindowPlan
from mlops_ray.features.windows import emit

START_US = -(2**62)
"""Before everything: where a stream begins that has not been advanced yet."""


class Stream(Protocol):
    """One view on its way through time."""

    definition: ViewDefinition

    def extend(self, prepared: Sequence[pa.Table]) -> None:
        """Take in rows, prepared as ``arrivals.prepare`` does it, in the order of their source."""

    def waiting(self, until_us: int) -> int:
        """Return how many rows the next advance to ``until_us`` would take."""

    def advance(self, until_us: int) -> pa.Table:
        """Return the feature rows, in the view's schema, of the rows that arrive in (cursor, until]."""


def open_stream(origin: Origin, after_us: int) -> Stream:
    """Return the stream of a view from ``after_us`` on; rows are given to it by ``extend``."""
    if origin.plan is None:
        return PlainStream(origin.definition, after_us)
    return WindowStream(origin.definition, origin.plan, after_us)


class PlainStream:
    """A view without windows: each row of the origin is a feature row.

    A row's created time is the moment from which on it may be used: when it arrives. Of rows with the
    same entity and times, the one that was available last stays; of such, the last of the source.
    """

    def __init__(self, definition: ViewDefinition, after_us: int) -> None:
        self.definition = definition
        self._cursor_us = after_us
        self._rows = definition.schema.empty_table()
        self._arrival_us = self._available_us = np.empty(0, np.int64)
        self._new: list[pa.Table] = []

    def extend(self, prepared: Sequence[pa.Table]) -> None:
        """Take in rows; those that arrived before the cursor are done already."""
        for table in prepared:
            fresh = table[ARRIVAL].to_numpy() > self._cursor_us
            self._new.append(table if fresh.all() else table.filter(pa.array(fresh)))

    def waiting(self, until_us: int) -> int:
        """Return how many rows the next advance to ``until_us`` would take."""
        return int(np.searchsorted(self._sorted(), until_us, side="right"))

    def advance(self, until_us: int) -> pa.Table:
        """Return the feature rows of the rows that arrive in (cursor, until]."""
        count = self.waiting(until_us)
        taken = self._rows.slice(0, count)
        self._rows, self._arrival_us = self._rows.slice(count), self._arrival_us[count:]
        self._available_us = self._available_us[count:]
        self._cursor_us = max(self._cursor_us, until_us)
        return taken

    def _sorted(self) -> NDArray[np.int64]:
        """Put new rows among those that wait."""
        new, self._new = [table for table in self._new if table.num_rows], []
        if new:
            taken = pa.concat_tables(new)
            rows = _feature_rows(self.definition, taken)
            rows = pa.concat_tables([self._rows, rows]).combine_chunks()
            times = (self._available_us, taken[AVAILABLE]), (self._arrival_us, taken[ARRIVAL])
            available_us, arrival_us = (np.concatenate(moments) for moments in times)
            last = _last_of_equal(self.definition, rows, np.lexsort((available_us, arrival_us)))
            self._rows = rows.take(pa.array(last))
            self._available_us, self._arrival_us = available_us[last], arrival_us[last]
        return self._arrival_us


class WindowStream:
    """A view with windows: keeps the cells of the longest window, and nothing else.

    The cells are a pure function of the rows that arrived up to the cursor. After a start they are
    made anew at the first advance, from older rows that ``extend`` is given again.
    """

    def __init__(self, definition: ViewDefinition, plan: WindowPlan, after_us: int) -> None:
        self.definition = definition
        self.plan = plan
        self._entities = Entities(_key_fields(definition))
        self._whole = [dtype == "int" for dtype in definition.features.values()]
        self._tile = after_us // plan.every_us
        self._expired_to = self._tile
        self._cells: Cells | None = None
        self._waiting: list[Rows] = []

    @property
    def cursor_us(self) -> int:
        """The last boundary that is done."""
        return self._tile * self.plan.every_us

    def extend(self, prepared: Sequence[pa.Table]) -> None:
        """Take in rows; after the first advance, those before the cursor are done already."""
        for table in prepared:
            if table.num_rows:
                self._waiting.append(self._numbered(table))

    def waiting(self, until_us: int) -> int:
        """Return how many rows the next advance to ``until_us`` would take."""
        upto_us = until_us // self.plan.every_us * self.plan.every_us
        span = (self.cursor_us, upto_us)
        return int(np.diff(np.searchsorted(self._sorted().arrival_us, span, side="right"))[0])

    def advance(self, until_us: int) -> pa.Table:
        """Return the feature rows of the boundaries in (cursor, until]."""
        upto = until_us // self.plan.every_us
        if upto <= self._tile:
            return self.definition.schema.empty_table()
        rows = self._sorted()
        ends = (self.cursor_us, upto * self.plan.every_us)
        start, stop = np.searchsorted(rows.arrival_us, ends, side="right")
        if self._cells is None:
            self._cells = cells_of(rows.take(slice(0, start)), self.plan)
        fresh = cells_of(rows.take(slice(start, stop)), self.plan)
        cells = merge(self._cells, fresh)
        table = self._table(cells, *boundaries_of(fresh, self._tile, upto))
        self._cells, self._tile = cells, upto
        self._waiting = [rows.take(slice(stop, None))]
        self._forget()
        return table

    def _sorted(self) -> Rows:
        """Return the rows that wait in order of arrival."""
        if not self._waiting:
            return _no_rows(self.plan)
        if len(self._waiting) > 1:
            rows = Rows.join(self._waiting)
            self._waiting = [rows.take(np.argsort(rows.arrival_us, kind="stable"))]
        return self._waiting[0]

    def _numbered(self, table: pa.Table) -> Rows:
        keys = table.select([*self.definition.keys])
        count = len(self.plan.columns) + len(self.plan.hashed)
        values = np.zeros((count, table.num_rows))
        valid = np.ones(values.shape, np.bool_)
        for number in range(count):
            column = table[f"value {number}"]
            if column.null_count:
                valid[number] = column.is_valid().to_numpy()
                column = column.fill_null(0)
            values[number] = column.to_numpy()
        event_us, arrival_us = table[EVENT].to_numpy(), table[ARRIVAL].to_numpy()
        rows = Rows(self._entities.numbers(keys), event_us, arrival_us, values, valid)
        if (arrival_us[1:] >= arrival_us[:-1]).all():
            return rows
        return rows.take(np.argsort(arrival_us, kind="stable"))

    def _table(
        self, cells: Cells, entity: NDArray[np.int64], boundary: NDArray[np.int64]
    ) -> pa.Table:
        emitted = emit(cells, entity, boundary, self.plan)
        times = pa.array(emitted.boundary_us).view(INSTANT)
        some_null = np.any(emitted.null, axis=0)
        columns = [*self._entities.keys(emitted.entity), times, times]
        for at, whole in enumerate(self._whole):
            values = np.ascontiguousarray(emitted.values[:, at])
            if whole:
                values = values.astype(np.int64)
            columns.append(pa.array(values, mask=emitted.null[:, at] if some_null[at] else None))
        return pa.table(columns, schema=self.definition.schema)

    def _forget(self) -> None:
        """Drop expired cells now and then: each time would cost more than carrying them along."""
        if self._cells is not None and self._tile - self._expired_to >= max(1, self.plan.span // 8):
            self._cells = expire(self._cells, self._tile + 2 - self.plan.span)
            self._expired_to = self._tile


def _feature_rows(definition: ViewDefinition, prepared: pa.Table) -> pa.Table:
    """Return prepared rows of a plain view as feature rows, in the same order."""
    times = [prepared[name].cast(INSTANT) for name in (EVENT, ARRIVAL)]
    columns = [prepared[name] for name in definition.keys] + times
    columns += [prepared[name] for name in definition.features]
    return pa.table(columns, schema=definition.schema)


def _last_of_equal(
    definition: ViewDefinition, rows: pa.Table, order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rows of an order by arrival; of those with equal entity and times the last only."""
    entity, _ = encode([rows[name] for name in definition.keys])
    event_us, arrival_us = (
        rows[name].cast(pa.int64()).to_numpy()[order] for name in ("event_time", "created_time")
    )
    within = np.lexsort((event_us, entity[order], arrival_us))
    entity, event_us, arrival_us = entity[order][within], event_us[within], arrival_us[within]
    same = (
        (entity[1:] == entity[:-1])
        & (event_us[1:] == event_us[:-1])
        & (arrival_us[1:] == arrival_us[:-1])
    )
    last = np.append(~same, True)[: len(within)]
    return order[within][last]


def _key_fields(definition: ViewDefinition) -> pa.Schema:
    return pa.schema([definition.schema.field(name) for name in definition.keys])


def _no_rows(plan: WindowPlan) -> Rows:
    nothing = np.empty(0, np.int64)
    values = np.empty((len(plan.columns) + len(plan.hashed), 0))
    return Rows(nothing, nothing, nothing, values, values.astype(np.bool_))
