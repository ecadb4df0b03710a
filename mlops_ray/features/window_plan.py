"""What the windows of a view are computed from: which partial aggregates of which columns' rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.features import FeatureView
from mlops_ray.features.columns import NO_TIME, duration_us

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Array = NDArray[np.float64] | NDArray[np.int64]
Part = tuple[str, int]
Parts = dict[Part, Array]

# The partial aggregates of a cell: what merges two of them, and what changes nothing. The codes of
# distinct values lie in the cells' pool: a cell has those from ``start`` on, ``codes`` of them.
MERGE = {
    "rows": np.add,
    "values": np.add,
    "sum": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "last": None,
    "when": np.maximum,
    "start": None,
    "codes": None,
}
IDENTITY = {
    "rows": 0,
    "values": 0,
    "sum": 0.0,
    "min": np.inf,
    "max": -np.inf,
    "last": np.nan,
    "when": NO_TIME,
    "start": 0,
    "codes": 0,
}
_NEEDS = {
    "count": ("rows",),
    "sum": ("values", "sum"),
    "mean": ("values", "sum"),
    "min": ("values", "min"),
    "max": ("values", "max"),
    "last": ("values", "last", "when"),
    "approx_distinct": ("start", "codes"),
}


@dataclass(frozen=True)
class WindowPlan:
    """What to compute for a view: ``columns`` are the value columns, numbered in this order.

    ``hashed`` are the columns whose distinct values are counted, numbered on behind them.
    ``aggregates`` pairs an aggregate with a column's number, ``windows`` are in tiles.
    """

    every_us: int
    windows: tuple[int, ...]
    aggregates: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    hashed: tuple[str, ...] = ()

    @property
    def span(self) -> int:
        """The longest window, in tiles."""
        return max(self.windows)

    @property
    def width(self) -> int:
        """How many features there are."""
        return len(self.windows) * len(self.aggregates)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The partial aggregates that these features are made from."""
        needed = [(part, of) for by, of in self.aggregates for part in _NEEDS[by]]
        return tuple(
            dict.fromkeys(("rows", 0) if part == "rows" else (part, of) for part, of in needed)
        )

    def tile(self, instants_us: Ints) -> Ints:
        """Return the number of the tile that each instant lies in; a boundary closes its tile."""
        return -((-instants_us) // self.every_us)


def plan_of(view: FeatureView) -> WindowPlan:
    """Return the plan of a windowed view."""
    assert view.every is not None
    every_us = duration_us(view.every)
    named = [(a.by, a.of) for a in view.aggregates.values() if a.of is not None]
    columns = tuple(dict.fromkeys(of for by, of in named if by != "approx_distinct"))
    hashed = tuple(dict.fromkeys(of for by, of in named if by == "approx_distinct"))
    numbers = {(False, of): at for at, of in enumerate(columns)}
    numbers |= {(True, of): at for at, of in enumerate(hashed, len(columns))}
    aggregates = tuple(
        (a.by, 0 if a.of is None else numbers[a.by == "approx_distinct", a.of])
        for a in view.aggregates.values()
    )
    windows = tuple(duration_us(window) // every_us for window in view.windows)
    return WindowPlan(every_us, windows, aggregates, columns, hashed)


@dataclass(frozen=True)
class Rows:
    """Rows of a view's source, as parallel arrays.

    ``entity`` is the number of the entity, ``event_us`` when the row happened, ``arrival_us`` from
    when on it may be used. ``values`` and ``valid`` are [columns, rows]; of a hashed column they are
    the codes of its values.
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

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts, of which there is at least one."""
        return Rows(
            np.concatenate([part.entity for part in parts]),
            np.concatenate([part.event_us for part in parts]),
            np.concatenate([part.arrival_us for part in parts]),
            np.concatenate([part.values for part in parts], axis=1),
            np.concatenate([part.valid for part in parts], axis=1),
        )
