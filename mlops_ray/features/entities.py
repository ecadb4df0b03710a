"""The entities of a view by number, as they are met."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.features.columns import encode

_FEW_ROWS = 256
_MOST_CHUNKS = 64


class Entities:
    """Numbers 0, 1, … for the distinct keys of a view.

    Those of the first rows are in order of the keys, so that the feature rows of a backfill are sorted
    when they are made; later ones are in order of appearance.

    Args:
        fields: The key columns.
    """

    def __init__(self, fields: pa.Schema) -> None:
        self._keys = fields.empty_table()
        self._known: dict[tuple[Any, ...], int] | None = None

    def __len__(self) -> int:
        return self._keys.num_rows

    def numbers(self, keys: pa.Table) -> NDArray[np.int64]:
        """Return the number of each row's key, none of which is null; new ones get the next."""
        if len(self) > 0 and keys.num_rows <= _FEW_ROWS:
            return self._look_up(keys)
        known = len(self)
        whole = pa.concat_tables([self._keys, keys])
        numbers, distinct = encode(whole.columns)
        self._keys = pa.table(distinct, schema=self._keys.schema)
        self._known = None
        if known:
            return numbers[known:]
        order = pc.sort_indices(self._keys, sort_keys=[(n, "ascending") for n in keys.column_names])
        self._keys = self._keys.take(order)
        rank = np.empty(len(order), np.int64)
        rank[order.to_numpy()] = np.arange(len(order))
        return rank[numbers]

    def keys(self, numbers: NDArray[np.int64]) -> list[pa.ChunkedArray]:
        """Return the key columns of entities."""
        if len(self._keys.columns[0].chunks) > _MOST_CHUNKS:
            self._keys = self._keys.combine_chunks()
        place = pa.array(numbers)
        return [values.take(place) for values in self._keys.columns]

    def _look_up(self, keys: pa.Table) -> NDArray[np.int64]:
        """Numbers of a few rows: without going through all the keys that are known."""
        if self._known is None:
            rows = zip(*(values.to_pylist() for values in self._keys.columns), strict=True)
            self._known = {row: number for number, row in enumerate(rows)}
        known = self._known
        new: list[int] = []
        numbers: list[int] = []
        rows = zip(*(values.to_pylist() for values in keys.columns), strict=True)
        for place, row in enumerate(rows):
            number = known.setdefault(row, len(known))
            if number == len(self) + len(new):
                new.append(place)
            numbers.append(number)
        if new:
            self._keys = pa.concat_tables([self._keys, keys.take(pa.array(new))])
        return np.array(numbers, np.int64)
