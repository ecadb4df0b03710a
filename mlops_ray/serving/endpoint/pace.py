"""How many rows a batch may have, so that it takes no longer than it should."""

from __future__ import annotations

LEAST_ROWS = 8
"""Batches may always have so many rows: fewer would say too little about what a row costs."""

_GROWTH = 1.25
_MEMORY = 0.9
_LEAST_SPREAD = 0.05


class Pace:
    """Learns from batches that take long what a batch costs, and what each of its rows.

    The limit follows the rows that fit into the target. Where a batch costs much whatever its rows,
    smaller ones would only be more: the rows may then take as long as the batch without them. The
    limit falls by half at most, as a pause of the machine says nothing about rows, and grows by a
    quarter.

    Args:
        most: The largest limit, and the first.
        target_s: How long a batch may take.
    """

    def __init__(self, most: int, target_s: float) -> None:
        self._most = float(most)
        self._least = float(min(LEAST_ROWS, most))
        self._target_s = target_s
        self.limit = self._most
        # Means of late, as sums with weights that fade: batches, rows, seconds, and their products.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, rows: int, seconds: float) -> None:
        """Take a batch into account."""
        is_long = seconds > self._target_s
        if not is_long and self.limit >= self._most:
            return
        new = (1.0, rows, seconds, rows * rows, rows * seconds)
        self._sums = n, x, y, xx, xy = tuple(  # type: ignore[assignment]
            _MEMORY * old + added for old, added in zip(self._sums, new, strict=True)
        )
        spread = xx / n - (x / n) ** 2
        if spread > (_LEAST_SPREAD * x / n) ** 2:
            self._follow(rows, is_long, (xy / n - x * y / n**2) / spread, x / n, y / n)
        elif not is_long or self.limit <= self._least:
            self._grow(rows, self._most)
        else:
            # Batches of one size say nothing yet: try smaller ones.
            self._fall(rows * self._target_s / seconds)

    def _follow(
        self, rows: int, is_long: bool, each_s: float, mean_rows: float, mean_s: float
    ) -> None:
        fixed_s = max(0.0, mean_s - each_s * mean_rows)
        for_rows_s = max(self._target_s - fixed_s, fixed_s)
        # What the means cannot tell from nothing is nothing.
        fitting = for_rows_s / each_s if each_s * self._most > self._target_s / 100 else self._most
        if is_long and fitting < self.limit:
            self._fall(fitting)
        else:
            self._grow(rows, self._most if not is_long else fitting)

    def _fall(self, wanted: float) -> None:
        self.limit = max(self._least, self.limit / 2, min(self.limit, wanted))

    def _grow(self, rows: int, most: float) -> None:
        if rows * 2 >= self.limit:
            self.limit = max(self.limit, min(self._most, self.limit * _GROWTH, most))
