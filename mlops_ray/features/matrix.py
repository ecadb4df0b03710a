"""Feature columns whose numeric ones lie side by side: models take all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]
Rows = slice | NDArray[np.int64] | NDArray[np.bool_]


class FeatureMatrix(Columns):
    """Columns by name, arrays [n], numeric ones first. Immutable, and so must its arrays be treated.

    Args:
        numeric: The names of the numeric columns, each once.
        matrix: Their values, float64 [n, len(numeric)].
        others: The other columns, [n] each.
    """

    __slots__ = ("matrix", "numeric", "others")

    def __init__(
        self,
        numeric: tuple[str, ...],
        matrix: NDArray[np.float64],
        others: Columns,
    ) -> None:
        self.numeric = numeric
        self.matrix = matrix
        self.others = others

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a column; KeyError where there is none."""
        if name in self.others:
            return self.others[name]
        try:
            return self.matrix[:, self.numeric.index(name)]
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        yield from self.numeric
        yield from self.others

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self.numeric) + len(self.others)


def take(columns: Columns, rows: Rows) -> Columns:
    """Return some rows of all columns."""
    if isinstance(columns, FeatureMatrix):
        others = take(columns.others, rows) if columns.others else {}
        return FeatureMatrix(columns.numeric, columns.matrix[rows], others)
    return {name: values[rows] for name, values in columns.items()}


def join(parts: Sequence[Columns]) -> Columns:
    """Return the rows of all parts, which have the same columns, one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if not isinstance(first, FeatureMatrix):
        return {name: np.concatenate([part[name] for part in parts]) for name in first}
    matrices = [p for p in parts if isinstance(p, FeatureMatrix) and p.numeric == first.numeric]
    if len(matrices) == len(parts):
        matrix = np.concatenate([part.matrix for part in matrices])
        return FeatureMatrix(first.numeric, matrix, join([part.others for part in matrices]))
    return {name: np.concatenate([part[name] for part in parts]) for name in first}


def by_column(columns: Columns) -> Columns:
    """Return the same columns, each in one piece of memory, for work on one after the other."""
    if not isinstance(columns, FeatureMatrix):
        return columns
    return FeatureMatrix(columns.numeric, np.asfortranarray(columns.matrix), columns.others)
