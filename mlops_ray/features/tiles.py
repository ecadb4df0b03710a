"""Tiles: rows of a view's source become cells, mergeable partial aggregates.

Time is cut into tiles of length ``every``; tile number k is (k·every − every, k·every], so its number
is also that of the boundary that closes it. A row lies in the tile of its event time and *arrives*
in the tile of the moment from which on it may be used, max(event time, available at). A **cell**
holds the partial aggregates of the rows of one entity with the same tile and the same arrival. Cells
never change: a row that becomes known late makes a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import NO_TIME
from mlops_ray.features.hyperloglog import Codes, reduce_codes
from mlops_ray.features.window_plan import (
    IDENTITY,
    MERGE,
    Array,
    Bools,
    Ints,
    Part,
    Parts,
    Rows,
    WindowPlan,
)

_TILE_BITS = 36
_TILE_ORIGIN = 1 << (_TILE_BITS - 1)
_FEW_ROWS = 2048
_MOST_ENTITIES = 1 << (63 - _TILE_BITS)
_END = np.iinfo(np.int64).max
_NEVER_ARRIVED = np.iinfo(np.int64).min

_NO_CODES: Codes = np.empty(0, np.uint16)


@dataclass(frozen=True)
class Cells:
    """Cells in order of (entity, tile, arrival), and one past the end that holds identities.

    ``key`` packs entity and tile into one sortable number; ``arrival`` is a tile number. ``pool`` holds
    the codes of distinct values of all cells.
    """

    key: Ints
    arrival: Ints
    parts: Parts
    pool: Codes = field(default_factory=lambda: _NO_CODES)

    def __len__(self) -> int:
        return len(self.key) - 1

    def take(self, cells: Ints | Bools) -> Cells:
        """Return some of the cells; the selection must include the one past the end."""
        parts = {part: values[cells] for part, values in self.parts.items()}
        return Cells(self.key[cells], self.arrival[cells], parts, self.pool)

    @property
    def tile(self) -> Ints:
        """The tile of each cell."""
        return (self.key & ((1 << _TILE_BITS) - 1)) - _TILE_ORIGIN

    def codes(self, of: int) -> tuple[Ints, Ints]:
        """Return where in the pool each cell's codes of a column begin, and how many they are."""
        start, lengths = self.parts["start", of], self.parts["codes", of]
        return start.astype(np.int64, copy=False), lengths.astype(np.int64, copy=False)

    def packed(self) -> Cells:
        """Return the cells with a pool that holds nothing but their codes."""
        parts, pools, size = dict(self.parts), [], 0
        for name, of in self.parts:
            if name == "start":
                start, lengths = self.codes(of)
                pools.append(self.pool[spread(start, lengths)])
                parts["start", of] = size + np.cumsum(lengths) - lengths
                size += len(pools[-1])
        return replace(self, parts=parts, pool=np.concatenate([_NO_CODES, *pools]))


def no_cells(plan: WindowPlan) -> Cells:
    """Return the cells of no rows."""
    parts = {part: np.array([IDENTITY[part[0]]]) for part in plan.parts}
    return Cells(np.array([_END]), np.array([_NEVER_ARRIVED]), parts)


def cells_of(rows: Rows, plan: WindowPlan) -> Cells:
    """Return the cells of some rows, which may come in any order."""
    if not len(rows):
        return no_cells(plan)
    tile, arrival = plan.tile(rows.event_us), plan.tile(rows.arrival_us)
    if tile.min() <= -_TILE_ORIGIN or tile.max() >= _TILE_ORIGIN:
        raise FeatureStoreError("an event time is too far from 1970 for so short an 'every'")
    if rows.entity.max() >= _MOST_ENTITIES:
        raise FeatureStoreError(f"a view can have {_MOST_ENTITIES} entities at most")
    order = _cell_order(rows, tile, arrival)
    rows, key, arrival = rows.take(order), cell_key(rows.entity, tile)[order], arrival[order]
    starts = np.flatnonzero(
        np.concatenate(([True], (key[1:] != key[:-1]) | (arrival[1:] != arrival[:-1])))
    )
    parts, pool = _partials(rows, starts, plan)
    ended = {part: _with_end(values, part[0]) for part, values in parts.items()}
    return Cells(
        np.append(key[starts], _END), np.append(arrival[starts], _NEVER_ARRIVED), ended, pool
    )


def _cell_order(rows: Rows, tile: Ints, arrival: Ints) -> Ints:
    """Return the order by entity, tile, arrival, event time, arrival time and the values.

    Values come last, so that rows at the same instant add up in the same order wherever they are.
    Most rows come in order of arrival and few at one instant, so this sorts by cell alone where that
    is enough, and by value only where it matters.
    """
    if len(rows) <= _FEW_ROWS:
        columns = (*rows.valid, *rows.values[::-1], rows.arrival_us, rows.event_us, arrival)
        return np.lexsort((*columns, tile, rows.entity))
    first = int(tile.min())
    order = stable_order(rows.entity * (int(tile.max()) - first + 1) + (tile - first))
    entity, tile, arrival = rows.entity[order], tile[order], arrival[order]
    event_us, arrival_us = rows.event_us[order], rows.arrival_us[order]
    same = (entity[1:] == entity[:-1]) & (tile[1:] == tile[:-1])
    if (same & _descends(arrival, event_us, arrival_us)).any():
        late = np.lexsort((arrival_us, event_us, arrival, tile, entity))
        order, entity, arrival = order[late], entity[late], arrival[late]
        event_us, arrival_us = event_us[late], arrival_us[late]
        same = entity[1:] == entity[:-1]
    tied = same & (event_us[1:] == event_us[:-1]) & (arrival_us[1:] == arrival_us[:-1])
    if tied.any() and len(rows.values):
        group = np.cumsum(np.concatenate(([True], ~tied)))
        some = np.flatnonzero(np.append(tied, False) | np.concatenate(([False], tied)))
        place = order[some]
        values, valid = rows.values[:, place], rows.valid[:, place]
        order[some] = place[np.lexsort((*valid, *values[::-1], group[some]))]
    return order


def _descends(*columns: Ints) -> Bools:
    """Say where a row is less than the one before it, compared by the columns in turn."""
    less = np.zeros(len(columns[0]) - 1, np.bool_)
    equal = ~less
    for values in columns:
        less |= equal & (values[1:] < values[:-1])
        equal &= values[1:] == values[:-1]
    return less


def stable_order(values: Ints) -> Ints:
    """Return the order that sorts numbers from 0 on, equal ones as they come.

    Sorting numbers is several times quicker than sorting places by number, so where both fit into one
    word the place is packed behind the number.
    """
    count = len(values)
    if not count:
        return np.empty(0, np.int64)
    bits = count.bit_length()
    if int(values.max()).bit_length() + bits > 63:
        return np.argsort(values, kind="stable")
    packed = (values << bits) | np.arange(count)
    packed.sort()
    return packed & ((1 << bits) - 1)


def spread(starts: Ints, lengths: Ints) -> Ints:
    """Return start, start + 1, … for each start, as many as its length."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum())) + np.repeat(shift, lengths)


def merge(cells: Cells, newer: Cells) -> Cells:
    """Return all cells of both; those of ``newer`` arrived later than all of ``cells``."""
    if not len(newer):
        return cells
    newer = _moved(newer, len(cells.pool))
    count = len(newer)
    places = np.searchsorted(cells.key, newer.key[:-1], side="right") + np.arange(count)
    old = np.ones(len(cells.key) + count, np.bool_)
    old[places] = False

    def weave(first: NDArray[np.generic], second: NDArray[np.generic]) -> NDArray[np.generic]:
        woven = np.empty(len(old), first.dtype)
        woven[places] = second[:-1]
        woven[old] = first
        return woven

    parts = {part: weave(values, newer.parts[part]) for part, values in cells.parts.items()}
    key, arrival = weave(cells.key, newer.key), weave(cells.arrival, newer.arrival)
    pool = np.concatenate((cells.pool, newer.pool))
    return Cells(key, arrival, parts, pool)  # type: ignore[arg-type]


def _moved(cells: Cells, by: int) -> Cells:
    """Return cells whose codes lie further behind in the pool."""
    moved = {part: values + by for part, values in cells.parts.items() if part[0] == "start"}
    return replace(cells, parts=cells.parts | moved) if moved else cells


def expire(cells: Cells, before: int) -> Cells:
    """Return the cells whose tile is ``before`` or later."""
    keep = cells.tile >= before
    keep[-1] = True
    return cells.take(keep).packed()


def boundaries_of(cells: Cells, after: int, upto: int) -> tuple[Ints, Ints]:
    """Return the entities and boundaries, in this order, in which rows arrived: (after, upto]."""
    fresh = np.flatnonzero((cells.arrival > after) & (cells.arrival <= upto))
    pairs = cell_key(cells.key[fresh] >> _TILE_BITS, cells.arrival[fresh])
    # Only rows that became known late make pairs out of order.
    if (pairs[1:] < pairs[:-1]).any():
        pairs.sort()
    pairs = pairs[np.concatenate(([True], pairs[1:] != pairs[:-1]))] if len(pairs) else pairs
    return pairs >> _TILE_BITS, (pairs & ((1 << _TILE_BITS) - 1)) - _TILE_ORIGIN


def _partials(rows: Rows, starts: Ints, plan: WindowPlan) -> tuple[Parts, Codes]:
    """Return the partial aggregates of each cell, whose rows begin at ``starts``."""
    parts: Parts = {}
    pools, size = [_NO_CODES], 0
    for name, of in plan.parts:
        if name == "start":
            pool, lengths = _cell_codes(rows, starts, of)
            parts["codes", of] = lengths
            parts["start", of] = size + np.cumsum(lengths) - lengths
            pools.append(pool)
            size += len(pool)
        elif name != "codes":
            parts[name, of] = _partial(rows, starts, (name, of))
    # All cells have their parts in one order, that of the plan.
    return {part: parts[part] for part in plan.parts}, np.concatenate(pools)


def _cell_codes(rows: Rows, starts: Ints, of: int) -> tuple[Codes, Ints]:
    cell = np.zeros(len(rows), np.int64)
    cell[starts[1:]] = 1
    valid = rows.valid[of]
    codes, owner = reduce_codes(rows.values[of][valid].astype(np.uint16), np.cumsum(cell)[valid])
    return codes, np.bincount(owner, minlength=len(starts))


def _partial(rows: Rows, starts: Ints, part: Part) -> Array:
    name, of = part
    if name == "rows":
        return np.diff(np.append(starts, len(rows)))
    valid = rows.valid[of]
    if name == "values":
        return np.add.reduceat(valid.astype(np.int64), starts)
    if name in ("last", "when"):
        return _newest(rows, starts, of)[name]
    identity = IDENTITY[name]
    values = np.where(valid, rows.values[of] + 0.0, identity)
    partial: Array = MERGE[name].reduceat(values, starts)  # type: ignore[union-attr]
    return partial


def _newest(rows: Rows, starts: Ints, of: int) -> dict[str, Array]:
    """Return the last value that is not null in each cell, and its event time."""
    place = np.where(rows.valid[of], np.arange(len(rows)), -1)
    place = np.maximum.reduceat(place, starts)
    some = place >= 0
    return {
        "last": np.where(some, rows.values[of][place], np.nan),
        "when": np.where(some, rows.event_us[place], NO_TIME),
    }


def _with_end(values: Array, part: str) -> Array:
    ended: Any = np.append(values, np.asarray(IDENTITY[part], values.dtype))
    return ended


def cell_key(entity: Ints, tile: Ints) -> Ints:
    """Pack entity and tile into one number that sorts by (entity, tile)."""
    return (entity << _TILE_BITS) + (tile + _TILE_ORIGIN)
