"""Tiles: rows of a view's source become cells, mergeable partial aggregates.

Time is cut into tiles of length ``every``; tile number k is (k·every − every, k·every], so its number
is also that of the boundary that closes it. A row lies in the tile of its event time and *arrives*
in the tile of the moment from which on it may be used, max(event time, available at). A **cell**
holds the partial aggregates of the rows of one entity with the same tile and the same arrival. Cells
never change: a row that becomes known late makes a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.features import FeatureView
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import NO_TIME, duration_us

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Array = NDArray[np.float64] | NDArray[np.int64]
Part = tuple[str, int]
Parts = dict[Part, Array]

_SECOND_US = 1_000_000
_TILE_BITS = 36
_TILE_ORIGIN = 1 << (_TILE_BITS - 1)
_MOST_ENTITIES = 1 << (63 - _TILE_BITS)
_END = np.iinfo(np.int64).max

# The partial aggregates of a cell: what merges two of them, and what changes nothing.
MERGE = {
    "rows": np.add,
    "values": np.add,
    "sum": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "last": None,
    "when": np.maximum,
}
IDENTITY = {
    "rows": 0,
    "values": 0,
    "sum": 0.0,
    "min": np.inf,
    "max": -np.inf,
    "last": np.nan,
    "when": NO_TIME,
}
_NEEDS = {
    "count": ("rows",),
    "sum": ("values", "sum"),
    "mean": ("values", "sum"),
    "min": ("values", "min"),
    "max": ("values", "max"),
    "last": ("values", "last", "when"),
}


@dataclass(frozen=True)
class WindowPlan:
    """What to compute for a view: ``columns`` are the value columns, numbered in this order.

    ``aggregates`` pairs an aggregate with a column's number, ``windows`` are in tiles.
    """

    every_us: int
    windows: tuple[int, ...]
    aggregates: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]

    @property
    def span(self) -> int:
        """The longest window, in tiles."""
        return max(self.windows)

    @property
    def width(self) -> int:
        """How many features there are."""
        return len(self.windows) * len(self.aggregates)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The partial aggregates that these features are made from."""
        needed = [(part, of) for by, of in self.aggregates for part in _NEEDS[by]]
        return tuple(
            dict.fromkeys(("rows", 0) if part == "rows" else (part, of) for part, of in needed)
        )

    def tile(self, instants_us: Ints) -> Ints:
        """Return the number of the tile that each instant lies in; a boundary closes its tile."""
        return -((-instants_us) // self.every_us)


def plan_of(view: FeatureView, where: str) -> WindowPlan:
    """Return the plan of a windowed view.

    Raises:
        FeatureStoreError: A window is not a multiple of ``every``, or that is under a second.
    """
    every_us = duration_us(view.every) if view.every else 0
    lengths_us = [duration_us(window) for window in view.windows]
    if every_us < _SECOND_US or any(w < every_us or w % every_us for w in lengths_us):
        raise FeatureStoreError(
            "windows must be multiples of 'every', which must be one second or more",
            where=where,
            why=f"every is {view.every}, windows are {', '.join(str(w) for w in view.windows)}",
            fix="choose for example every: 1h with windows: [1d, 7d]",
        )
    columns = tuple(dict.fromkeys(a.of for a in view.aggregates.values() if a.of is not None))
    aggregates = tuple(
        (a.by, columns.index(a.of) if a.of is not None else 0) for a in view.aggregates.values()
    )
    return WindowPlan(every_us, tuple(w // every_us for w in lengths_us), aggregates, columns)


@dataclass(frozen=True)
class Rows:
    """Rows of a view's source, as parallel arrays.

    ``entity`` is the number of the entity, ``event_us`` when the row happened, ``arrival_us`` from
    when on it may be used. ``values`` and ``valid`` are [columns, rows].
    """

    entity: Ints
    event_us: Ints
    arrival_us: Ints
    values: Floats
    valid: Bools

    def __len__(self) -> int:
        return len(self.entity)

    def take(self, rows: Ints | Bools | slice) -> Rows:
        """Return some of the rows."""
        return Rows(
            self.entity[rows],
            self.event_us[rows],
            self.arrival_us[rows],
            self.values[:, rows],
            self.valid[:, rows],
        )


@dataclass(frozen=True)
class Cells:
    """Cells in order of (entity, tile, arrival), and one past the end that holds identities.

    ``key`` packs entity and tile into one sortable number; ``arrival`` is a tile number.
    """

    key: Ints
    arrival: Ints
    parts: Parts

    def __len__(self) -> int:
        return len(self.key) - 1

    def take(self, cells: Ints | Bools) -> Cells:
        """Return some of the cells; the selection must include the one past the end."""
        parts = {part: values[cells] for part, values in self.parts.items()}
        return Cells(self.key[cells], self.arrival[cells], parts)


def no_cells(plan: WindowPlan) -> Cells:
    """Return the cells of no rows."""
    parts = {part: np.array([IDENTITY[part[0]]]) for part in plan.parts}
    return Cells(np.array([_END]), np.array([np.iinfo(np.int64).min]), parts)


def cells_of(rows: Rows, plan: WindowPlan) -> Cells:
    """Return the cells of some rows, which may come in any order."""
    if not len(rows):
        return no_cells(plan)
    tile, arrival = plan.tile(rows.event_us), plan.tile(rows.arrival_us)
    if tile.min() <= -_TILE_ORIGIN or tile.max() >= _TILE_ORIGIN:
        raise FeatureStoreError("an event time is too far from 1970 for so short an 'every'")
    if rows.entity.max() >= _MOST_ENTITIES:
        raise FeatureStoreError(f"a view can have {_MOST_ENTITIES} entities at most")
    key = cell_key(rows.entity, tile)
    # Values come last, so that rows at the same instant add up in the same order wherever they are.
    order = np.lexsort((*rows.values, rows.arrival_us, rows.event_us, arrival, key))
    rows, key, arrival = rows.take(order), key[order], arrival[order]
    starts = np.flatnonzero(
        np.concatenate(([True], (key[1:] != key[:-1]) | (arrival[1:] != arrival[:-1])))
    )
    parts = {part: _with_end(_partial(rows, starts, part), part[0]) for part in plan.parts}
    return Cells(
        np.append(key[starts], _END), np.append(arrival[starts], np.iinfo(np.int64).min), parts
    )


def merge(cells: Cells, newer: Cells) -> Cells:
    """Return all cells of both; those of ``newer`` arrived later than all of ``cells``."""
    if not len(newer):
        return cells
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
    return Cells(key, arrival, parts)  # type: ignore[arg-type]


def expire(cells: Cells, before: int) -> Cells:
    """Return the cells whose tile is ``before`` or later."""
    tile = (cells.key & ((1 << _TILE_BITS) - 1)) - _TILE_ORIGIN
    keep = tile >= before
    keep[-1] = True
    return cells.take(keep)


def boundaries_of(cells: Cells, after: int, upto: int) -> tuple[Ints, Ints]:
    """Return the entities and boundaries, in this order, in which rows arrived: (after, upto]."""
    fresh = np.flatnonzero((cells.arrival > after) & (cells.arrival <= upto))
    pairs = np.unique(cell_key(cells.key[fresh] >> _TILE_BITS, cells.arrival[fresh]))
    return pairs >> _TILE_BITS, (pairs & ((1 << _TILE_BITS) - 1)) - _TILE_ORIGIN


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
