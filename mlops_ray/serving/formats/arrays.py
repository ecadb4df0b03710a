"""Typed arrays of a request, checked a whole array at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import RequestField
from mlops_ray.serving.formats.fields import INT64_MAX, Column, FieldCheck, whole_bounds
from mlops_ray.serving.formats.instants import FIRST_US, LAST_US, instants
from mlops_ray.serving.formats.refusal import refusal

Arrays = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]

_MICROSECONDS = np.dtype("datetime64[us]")
_FITTING = {
    "string": ("O", "texts"),
    "int": ("iu", "whole numbers"),
    "float": ("fiu", "numbers"),
    "bool": ("b", "booleans"),
    "timestamp": ("MiuO", "times: integers in µs since 1970 UTC, or ISO 8601 texts"),
}
_WORDS = {"b": "booleans", "i": "whole numbers", "u": "whole numbers", "f": "numbers"}
_WORDS |= {"O": "texts", "M": "times"}


class ArrayCheck:
    """Turns a typed array into the column of one field."""

    def __init__(self, name: str, field: RequestField) -> None:
        self._name = name
        self._nullable = field.nullable
        self._bounds: tuple[float | None, float | None] = (field.minimum, field.maximum)
        if field.dtype == "int":
            self._bounds = whole_bounds(field)
        self._slow = FieldCheck(name, field)
        self._kinds, self._wanted = _FITTING[field.dtype]
        self._make: Callable[[NDArray[Any], Mask], Column] = getattr(self, f"_{field.dtype}")

    def column(self, array: NDArray[Any], valid: NDArray[Any] | None = None) -> Column:
        """Return the column of ``array``; where ``valid`` is false, there is a null.

        Raises:
            RequestError: 422 with the first wrong row; of nulls, ranges, types and texts.
        """
        if array.ndim != 1:
            raise refusal(f"must have one dimension, not {array.ndim}", self._name)
        if array.dtype.kind not in self._kinds:
            kind = _WORDS.get(array.dtype.kind, str(array.dtype))
            raise refusal(f"must hold {self._wanted}, not {kind}", self._name)
        known = _mask(array, valid, self._name)
        if not self._nullable and not known.all():
            raise refusal("must not be null", self._name, _first(~known))
        return self._make(array, known)

    def _string(self, array: NDArray[Any], known: Mask) -> Column:
        return texts(array, self._name, known)

    def _bool(self, array: NDArray[Any], known: Mask) -> Column:
        return _with_nulls(array.astype(np.bool_), known)

    def _int(self, array: NDArray[Any], known: Mask) -> Column:
        if array.dtype == np.uint64 and (large := (array > INT64_MAX) & known).any():
            raise refusal("does not fit 64 bits", self._name, _first(large))
        column = array.astype(np.int64)
        self._check_bounds(column, known)
        return _with_nulls(column, known)

    def _float(self, array: NDArray[Any], known: Mask) -> Column:
        column = array.astype(np.float64)
        missing = np.isnan(column)
        if self._nullable and missing.any():
            known = known & ~missing
        if (endless := ~np.isfinite(column) & known).any():
            text = "must be finite: NaN and Infinity are refused"
            raise refusal(text, self._name, _first(endless))
        self._check_bounds(column, known)
        return column if known.all() else np.where(known, column, np.nan)

    def _timestamp(self, array: NDArray[Any], known: Mask) -> Column:
        if array.dtype.kind == "O":
            return self._texts_as_times(array, known)
        column = array
        if array.dtype.kind == "M":
            column = array.astype(_MICROSECONDS, copy=False).view(np.int64)
        outside = ((column < FIRST_US) | (column > LAST_US)) & known
        if outside.any():
            text = "must be a time in the years 1 to 9999, in µs since 1970 UTC"
            raise refusal(text, self._name, _first(outside))
        times = column.astype(np.int64).view(_MICROSECONDS)
        times[~known] = np.datetime64("NaT")
        return times

    def _texts_as_times(self, array: NDArray[Any], known: Mask) -> Column:
        spelled = texts(array, self._name, known)
        return instants(spelled.tolist(), self._name)

    def _check_bounds(self, column: NDArray[Any], known: Mask) -> None:
        low, high = self._bounds
        if low is not None and (below := (column < low) & known).any():
            self._complain(column, below)
        if high is not None and (above := (column > high) & known).any():
            self._complain(column, above)

    def _complain(self, column: NDArray[Any], wrong: Mask) -> None:
        row = _first(wrong)
        self._slow.check_bounds(column[row].item(), row)


def texts(array: NDArray[Any], name: str, known: Mask | None) -> Column:
    """Return an object array of ``str``, and None where ``known`` is false.

    Raises:
        RequestError: 422 where a value is not text, or not UTF-8.
    """
    if array.dtype.kind != "O":
        raise refusal("must hold texts", name)
    values = array.tolist()
    for row, value in enumerate(values):
        if known is not None and not known[row]:
            values[row] = None
        elif type(value) is bytes:
            values[row] = _decoded(value, name, row)
        elif type(value) is not str:
            raise refusal("must hold texts", name, row)
    return np.array(values, dtype=object)


def from_table(table: pa.Table) -> tuple[dict[str, NDArray[Any]], dict[str, Mask]]:
    """Return arrays by column, and of columns with nulls what is not null.

    Raises:
        RequestError: 422 where a column has a type that no input can have.
    """
    arrays: dict[str, NDArray[Any]] = {}
    valid: dict[str, Mask] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        arrays[name] = _from_arrow(column, name)
        if column.null_count:
            valid[name] = column.is_valid().to_numpy()
    return arrays, valid


def _from_arrow(column: pa.ChunkedArray, name: str) -> NDArray[Any]:
    kind = column.type
    if pa.types.is_timestamp(kind):
        return _microseconds(column, name)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.to_numpy()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        if column.null_count:
            column = column.fill_null(pa.scalar(0).cast(kind))
        return column.to_numpy()
    raise refusal(f"cannot be read from Arrow's {kind}", name)


def _microseconds(column: pa.ChunkedArray, name: str) -> NDArray[Any]:
    if column.type.unit == "ns":
        # What is finer than a µs is cut, as it is of a text, towards the past before 1970 too.
        finer_ns = column.cast(pa.int64()).fill_null(0).to_numpy()
        return (finer_ns // 1000).view(_MICROSECONDS)
    try:
        # Seconds and ms may be too far away for µs.
        times = column.cast(pa.timestamp("us", tz=column.type.tz))
    except pa.ArrowInvalid:
        raise refusal("must be a time in the years 1 to 9999", name) from None
    return times.cast(pa.int64()).fill_null(0).to_numpy().view(_MICROSECONDS)


def _mask(array: NDArray[Any], valid: NDArray[Any] | None, name: str) -> Mask:
    if valid is not None and (valid.dtype.kind != "b" or valid.shape != array.shape):
        raise refusal("must hold one boolean for each row", f"{name}.valid")
    known = np.ones(len(array), np.bool_) if valid is None else valid
    if array.dtype.kind == "M":
        return known & ~np.isnat(array)
    return known


def _with_nulls(column: NDArray[Any], known: Mask) -> Column:
    if known.all():
        return column
    values = column.astype(object)
    values[~known] = None
    return values


def _first(wrong: Mask) -> int:
    return int(np.argmax(wrong))


def _decoded(value: bytes, name: str, row: int) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise refusal("must be UTF-8", name, row) from None
