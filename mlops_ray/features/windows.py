"""Trailing windows: cells become the features of an entity at a boundary.

The features of an entity at boundary H are merged from its cells with a tile in (H − window, H] and
an arrival of at most H; they are emitted for each H in which a row arrived. Where rows are known as
soon as they happen this is "had at least one row in (H − every, H]"; a row that becomes known late
counts from then on, in the place where it happened. Nulls are skipped: where a window has no value,
``count`` is 0 and the others are null.

A boundary's values are reduced from one contiguous, ordered run of cells, and cells never change.
So every way to cut time or entities into batches gives the same bits: backfill, incremental
advance and push share this one code path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlops_ray.features.columns import NO_TIME
from mlops_ray.features.hyperloglog import estimate
from mlops_ray.features.tiles import Cells, cell_key, spread
from mlops_ray.features.window_plan import (
    IDENTITY,
    MERGE,
    Array,
    Bools,
    Floats,
    Ints,
    Parts,
    WindowPlan,
)

_PAIRS = 1 << 22
_ESTIMATED = 1 << 14
_FEW_RUNS = 1024


@dataclass(frozen=True)
class Emitted:
    """Features of entities at boundaries: ``values`` float64 [n, width], ``null`` bool [n, width]."""

    entity: Ints
    boundary_us: Ints
    values: Floats
    null: Bools


def emit(cells: Cells, entity: Ints, boundary: Ints, plan: WindowPlan) -> Emitted:
    """Return the features of each entity at its boundary (a tile number)."""
    count = len(entity)
    values = np.zeros((count, plan.width))
    null = np.zeros((count, plan.width), np.bool_)
    high = np.searchsorted(cells.key, cell_key(entity, boundary), side="right")
    late = _late_before(cells)
    for number, window in enumerate(plan.windows):
        low = np.searchsorted(cells.key, cell_key(entity, boundary - window), side="right")
        merged = _window(cells, _Runs(low, high), boundary, plan, late)
        for place, (by, of) in enumerate(plan.aggregates):
            at = place * len(plan.windows) + number
            values[:, at], null[:, at] = _feature(by, of, merged)
    return Emitted(entity, boundary * plan.every_us, values, null)


def _feature(by: str, of: int, merged: Parts) -> tuple[Array, Bools | bool]:
    if by == "count":
        return merged["rows", 0], False
    if by == "approx_distinct":
        return merged["distinct", of], False
    values = merged["values", of]
    none = values == 0
    if by == "mean":
        mean: Floats = merged["sum", of] / np.maximum(values, 1)
        return mean, none
    return np.where(none, 0.0, merged[by, of]), none


class _Runs:
    """Runs of cells [low, high), one for each boundary; some may be empty."""

    def __init__(self, low: Ints, high: Ints) -> None:
        self.low = low
        self.high = high
        self._edges = np.empty(2 * len(low), np.int64)
        self._edges[::2], self._edges[1::2] = low, high
        empty = high <= low
        self._empty = empty if empty.any() else None

    def reduce(self, values: Array, operation: np.ufunc, identity: float) -> Array:
        """Reduce the values of each run; ``identity`` where it is empty."""
        if not len(self.low):
            return values[:0]
        if operation is np.add and values.dtype == np.int64 and len(self.low) > _FEW_RUNS:
            # Whole numbers add up exactly in any order, so two running totals tell a run's.
            total = _before(values)
            return total[np.maximum(self.high, self.low)] - total[self.low]
        reduced: Array = operation.reduceat(values, self._edges)[::2]
        if self._empty is not None:
            reduced[self._empty] = identity
        return reduced

    def take(self, runs: Ints) -> _Runs:
        """Return some of the runs."""
        return _Runs(self.low[runs], self.high[runs])


def _window(
    cells: Cells, runs: _Runs, boundary: Ints, plan: WindowPlan, late_before: Ints | None
) -> Parts:
    """Reduce each run for its boundary, without the cells that arrived after it."""
    merged = _merge_runs(cells, runs, plan)
    if late_before is None:
        return merged
    some_late = late_before[np.maximum(runs.high, runs.low)] > late_before[runs.low]
    late = np.flatnonzero(some_late)
    arrival = runs.take(late).reduce(cells.arrival, np.maximum, NO_TIME)
    late = late[arrival > boundary[late]]
    for chunk in _chunks(runs.high[late] - runs.low[late]):
        some = late[chunk]
        known = _only_known(cells, runs.take(some), boundary[some])
        for part, values in _merge_runs(*known, plan).items():
            merged[part][some] = values
    return merged


def _late_before(cells: Cells) -> Ints | None:
    """Return how many cells before each one arrived later than their tile, None where none did."""
    late = cells.arrival > cells.tile
    return _before(late) if late.any() else None


def _before(values: Array | Bools) -> Ints:
    """Return the sum of the values before each one, and of all."""
    total = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=total[1:])
    return total


def _merge_runs(cells: Cells, runs: _Runs, plan: WindowPlan) -> Parts:
    merged: Parts = {}
    for part in plan.parts:
        operation = MERGE[part[0]]
        if operation is not None:
            merged[part] = runs.reduce(cells.parts[part], operation, IDENTITY[part[0]])
    for name, of in plan.parts:
        if name == "last":
            merged["last", of] = _last(cells, runs, of, merged["when", of])
        if name == "codes":
            merged["distinct", of] = _distinct(cells, runs, of)
    return merged


def _distinct(cells: Cells, runs: _Runs, of: int) -> Ints:
    """Return about how many distinct values the cells of each run have met."""
    start, codes = cells.codes(of)
    lengths = np.maximum(runs.high - runs.low, 0)
    found = np.zeros(len(lengths), np.int64)
    for chunk in _chunks(runs.reduce(codes, np.add, 0).astype(np.int64), _ESTIMATED):
        cell = spread(runs.low[chunk], lengths[chunk])
        counts = codes[cell]
        owner = np.repeat(np.arange(len(lengths[chunk])), lengths[chunk])
        pool = cells.pool[spread(start[cell], counts)]
        found[chunk] = estimate(pool, np.repeat(owner, counts), len(lengths[chunk]))
    return found


def _last(cells: Cells, runs: _Runs, of: int, newest: Array) -> Array:
    """Return the value at the newest event time; of equal ones, the one that arrived last."""
    when, last, low = cells.parts["when", of], cells.parts["last", of], runs.low
    place = runs.high - 1
    # The newest is in the last tile that has a value, so this steps over few cells.
    behind = np.flatnonzero((place > low) & (when[place] != newest))
    while len(behind):
        place[behind] -= 1
        behind = behind[(place[behind] > low[behind]) & (when[place[behind]] != newest[behind])]
    values: Array = np.where(runs.high > low, last[place], np.nan)
    return values


def _only_known(cells: Cells, runs: _Runs, boundary: Ints) -> tuple[Cells, _Runs]:
    """Copy the cells of the runs, without those that arrive after the run's boundary."""
    lengths = runs.high - runs.low
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = spread(runs.low, lengths)
    known = cells.arrival[place] <= boundary[owner]
    ends = np.cumsum(np.bincount(owner[known], minlength=len(lengths)))
    starts = np.concatenate(([0], ends[:-1]))
    return cells.take(np.append(place[known], len(cells))), _Runs(starts, ends)


def _chunks(lengths: Ints, most: int = 1 << 62) -> Iterable[slice]:
    """Cut runs into slices that hold a bounded number of items, and at most ``most`` runs."""
    start, ends = 0, np.cumsum(lengths)
    while start < len(lengths):
        done = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, done + _PAIRS, side="right"))
        end = min(max(end, start + 1), start + most)
        yield slice(start, end)
        start = end
