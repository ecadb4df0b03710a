"""Columns that are filled piece by piece, in any order, to the same bits."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class ResultColumn(Protocol):
    """A column of a known length; what is not put is null."""

    def put(self, places: Ints, values: pa.Array) -> None:
        """Set the values at these places, each of which is set at most once; from any thread."""

    def finish(self) -> pa.Array:
        """Return the column. Equal values give equal bytes, those behind nulls too."""


def result_column(kind: pa.DataType, length: int) -> ResultColumn:
    """Return a column of nulls to be filled."""
    if pa.types.is_string(kind):
        return _TextColumn(length)
    return _FixedColumn(kind, length)


class _FixedColumn:
    def __init__(self, kind: pa.DataType, length: int) -> None:
        self._kind = kind
        self._values = np.zeros(length, _dtype(kind))
        self._valid = np.zeros(length, np.bool_)

    def put(self, places: Ints, values: pa.Array) -> None:
        if pa.types.is_timestamp(values.type):
            values = values.cast(pa.int64())
        valid: Any = True
        if values.null_count:
            valid = values.is_valid().to_numpy(zero_copy_only=False)
            values = pc.fill_null(values, pa.scalar(0, pa.int64()).cast(values.type))
        self._values[places] = values.to_numpy(zero_copy_only=False)
        self._valid[places] = valid

    def finish(self) -> pa.Array:
        values = self._values
        if values.dtype == np.bool_:
            values = np.packbits(values, bitorder="little")
        nulls = len(self._valid) - int(np.count_nonzero(self._valid))
        bits = pa.py_buffer(np.packbits(self._valid, bitorder="little")) if nulls else None
        buffers = [bits, pa.py_buffer(values)]
        return pa.Array.from_buffers(self._kind, len(self._valid), buffers, nulls)


class _TextColumn:
    def __init__(self, length: int) -> None:
        self._length = length
        self._pieces: list[tuple[Ints, pa.Array]] = []

    def put(self, places: Ints, values: pa.Array) -> None:
        self._pieces.append((places, values))

    def finish(self) -> pa.Array:
        origin = np.full(self._length, -1, np.int64)
        count = 0
        for places, _ in self._pieces:
            origin[places] = np.arange(count, count + len(places))
            count += len(places)
        pieces = pa.chunked_array([values for _, values in self._pieces], pa.string())
        found = pieces.take(pa.array(origin, mask=origin < 0))
        return _whole(found)


def _whole(values: pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)


def _dtype(kind: pa.DataType) -> Any:
    if pa.types.is_boolean(kind):
        return np.bool_
    return np.float64 if pa.types.is_floating(kind) else np.int64
