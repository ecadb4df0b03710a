"""Profiles: what values the features of a model take, as counts that can be added up.

The reference is fitted once on the training rows and travels in the model's package. Serving bins
live rows with it; monitoring adds the counts of replicas and days and compares them with the
reference's own. Neither needs the rows again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mlops_ray.errors import DataError
from mlops_ray.metadata.digest import digest_json

Counts = npt.NDArray[np.int64]
Column = npt.NDArray[Any]

MAX_VALUES = 30
"""How many of its most frequent values a categorical feature is counted by; the rest is other."""


@dataclass(frozen=True)
class Profile:
    """Counts per bin of each feature, int64 [bins], over ``rows`` rows.

    Profiles of one reference form a commutative monoid: ``merge`` is associative and commutative,
    ``Profile()`` is its identity.
    """

    counts: Mapping[str, Counts]
    rows: int = 0

    def __init__(self, counts: Mapping[str, Counts] | None = None, rows: int = 0) -> None:
        object.__setattr__(self, "counts", dict(counts or {}))
        object.__setattr__(self, "rows", rows)

    def merge(self, *others: Profile) -> Profile:
        """Return the counts of all together. DataError where they come from other references."""
        merged: dict[str, Counts] = {}
        for profile in (self, *others):
            for name, counts in profile.counts.items():
                known = merged.get(name)
                if known is not None and known.shape != counts.shape:
                    raise DataError(
                        f"profiles of {name!r} have {len(known)} and {len(counts)} bins",
                        why="they were counted with the references of different models",
                        fix="merge only profiles whose reference has the same digest",
                    )
                merged[name] = counts if known is None else known + counts
        return Profile(merged, sum(p.rows for p in (self, *others)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        return (
            self.rows == other.rows
            and self.counts.keys() == other.counts.keys()
            and all(np.array_equal(self.counts[name], other.counts[name]) for name in self.counts)
        )

    def __hash__(self) -> int:
        return hash((self.rows, tuple(sorted(self.counts))))

    def to_json(self) -> dict[str, Any]:
        """Return the profile as a JSON value."""
        return {"rows": self.rows, "counts": {n: c.tolist() for n, c in self.counts.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Profile:
        """Read what ``to_json`` wrote."""
        counts = {name: np.asarray(c, dtype=np.int64) for name, c in value["counts"].items()}
        return cls(counts, int(value["rows"]))


@dataclass(frozen=True)
class NumericBins:
    """Bins of a numeric feature: (−∞, e₀), [e₀, e₁), …, [eₖ₋₁, ∞), and last the missing ones."""

    edges: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, values: Column, bins: int) -> Self:
        """Cut at the quantiles of ``values``, so that bins hold about equally many of them.

        A value so frequent that several quantiles fall on it gets a bin of its own: a constant
        column has the bins below, equal and above, and a share of zeros that changes is seen.
        """
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if len(finite) == 0:
            return cls(np.empty(0))
        positions = np.arange(1, bins) / bins
        cuts, repeats = np.unique(
            np.quantile(finite, positions, method="inverted_cdf"), return_counts=True
        )
        heavy = cuts[(repeats > 1) | (len(cuts) == 1)]
        return cls(np.unique(np.concatenate([cuts, np.nextafter(heavy, np.inf)])))

    @property
    def size(self) -> int:
        """Number of bins."""
        return len(self.edges) + 2

    def count(self, values: Column) -> Counts:
        """Count values per bin."""
        numbers = np.asarray(values, dtype=np.float64)
        codes = np.searchsorted(self.edges, numbers, side="right")
        codes[np.isnan(numbers)] = self.size - 1
        return np.bincount(codes, minlength=self.size).astype(np.int64)

    @property
    def labels(self) -> list[str]:
        """Names of the bins, for people."""
        bounds = ["-inf", *(f"{edge:.6g}" for edge in self.edges), "inf"]
        return [f"[{a}, {b})" for a, b in pairwise(bounds)] + ["missing"]


@dataclass(frozen=True)
class CategoricalBins:
    """Bins of a categorical feature: one per known value, and last all other values and nulls."""

    values: tuple[str, ...]

    @classmethod
    def fit(cls, values: Column, limit: int = MAX_VALUES) -> Self:
        """Take the most frequent values, at most ``limit``; equal counts in alphabetical order."""
        tally = Counter(str(value) for value in values.tolist() if value is not None)
        ranked = sorted(tally.items(), key=lambda item: (-item[1], item[0]))
        return cls(tuple(value for value, _ in ranked[:limit]))

    @property
    def size(self) -> int:
        """Number of bins."""
        return len(self.values) + 1

    def count(self, values: Column) -> Counts:
        """Count values per bin."""
        codes = {value: code for code, value in enumerate(self.values)}
        counts = np.zeros(self.size, dtype=np.int64)
        for value, count in Counter(values.tolist()).items():
            known = value is not None
            counts[codes.get(str(value), self.size - 1) if known else self.size - 1] += count
        return counts

    @property
    def labels(self) -> list[str]:
        """Names of the bins, for people."""
        return [*self.values, "other"]


Bins = NumericBins | CategoricalBins


@dataclass(frozen=True)
class Reference:
    """The bins of each feature and how the training rows fell into them."""

    bins: Mapping[str, Bins]
    profile: Profile

    @classmethod
    def fit(cls, columns: Mapping[str, Column], bins: int) -> Self:
        """Fit on training rows: ``columns`` are [n]; strings and objects are categorical."""
        fitted: dict[str, Bins] = {}
        counts: dict[str, Counts] = {}
        rows = 0
        for name in columns:
            values = columns[name]
            categorical = values.dtype.kind in "OUST"
            fitted[name] = (
                CategoricalBins.fit(values) if categorical else NumericBins.fit(values, bins)
            )
            counts[name] = fitted[name].count(values)
            rows = len(values)
        return cls(fitted, Profile(counts, rows))

    def bin(self, columns: Mapping[str, Column]) -> Profile:
        """Count live rows. Features that ``columns`` lacks are left out; others are ignored."""
        known = {name: columns[name] for name in self.bins if name in columns}
        rows = len(next(iter(known.values()))) if known else 0
        return Profile({name: self.bins[name].count(v) for name, v in known.items()}, rows)

    @property
    def digest(self) -> str:
        """Digest of the bins and counts: profiles may be merged where it is the same."""
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the reference as a JSON value."""
        return {
            "rows": self.profile.rows,
            "numeric": {
                name: {"edges": b.edges.tolist(), "counts": self.profile.counts[name].tolist()}
                for name, b in self.bins.items()
                if isinstance(b, NumericBins)
            },
            "categorical": {
                name: {"values": list(b.values), "counts": self.profile.counts[name].tolist()}
                for name, b in self.bins.items()
                if isinstance(b, CategoricalBins)
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reference:
        """Read what ``to_json`` wrote."""
        bins: dict[str, Bins] = {
            name: NumericBins(np.asarray(item["edges"], dtype=np.float64))
            for name, item in value["numeric"].items()
        }
        for name, item in value["categorical"].items():
            bins[name] = CategoricalBins(tuple(item["values"]))
        entries = {**value["numeric"], **value["categorical"]}
        counts = {name: item["counts"] for name, item in entries.items()}
        return cls(bins, Profile.from_json({"rows": value["rows"], "counts": counts}))


def merge(profiles: Iterable[Profile]) -> Profile:
    """Return the sum of any number of profiles; ``Profile()`` of none."""
    return Profile().merge(*profiles)
