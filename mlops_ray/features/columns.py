"""Columns of Arrow tables as numpy arrays: instants, numbers and entity keys, with their nulls."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.errors import SchemaError

INSTANT = pa.timestamp("us", tz="UTC")
NO_TIME = np.iinfo(np.int64).min
"""Stands for a null among instants in µs."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
KEY_TYPES = {"string": pa.string(), "int": pa.int64()}


def to_us(moment: datetime) -> int:
    """Return an aware datetime as whole µs since 1970 UTC."""
    return (moment - _EPOCH) // _MICROSECOND


def from_us(instant_us: int) -> datetime:
    """Return µs since 1970 as an aware datetime in UTC."""
    return _EPOCH + int(instant_us) * _MICROSECOND


def duration_us(length: timedelta) -> int:
    """Return a length of time in whole µs."""
    return length // _MICROSECOND


def column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """Return a column.

    Raises:
        SchemaError: The table has no such column; names the nearest one.
    """
    if name not in table.column_names:
        near = difflib.get_close_matches(name, table.column_names, 1)
        raise SchemaError(
            f"there is no column {name!r}",
            where=where,
            why=f"the columns are {', '.join(table.column_names)}",
            fix=f"did you mean {near[0]!r}?" if near else "name a column that the table has",
        )
    return table[name]


def normalise_instants(table: pa.Table) -> pa.Table:
    """Return the table with every timestamp column as ``timestamp[us, UTC]``; naive ones are UTC."""
    for index, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type != INSTANT:
            cast = to_instants(table.column(index), field.name)
            table = table.set_column(index, pa.field(field.name, INSTANT), cast)
    return table


def to_instants(values: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Return timestamps or dates as ``timestamp[us, UTC]``; naive ones are UTC.

    What is finer than a microsecond is cut off towards the past, before 1970 too: what falls in one
    microsecond happens at once, rows and labels alike.

    Raises:
        SchemaError: A time is too far away for whole microseconds in 64 bits.
    """
    if pa.types.is_timestamp(values.type) and values.type.unit == "ns":
        if values.type.tz is not None:
            # Flooring goes by local time, which an hour of autumn has twice.
            values = values.cast(pa.timestamp("ns", tz="UTC"))
        values = pc.floor_temporal(values, unit="microsecond")
    try:
        return values.cast(INSTANT)
    except pa.ArrowInvalid as error:
        raise SchemaError(
            "a time is out of range", where=where, why=str(error), fix="correct or drop the row"
        ) from error


def instants(table: pa.Table, name: str, where: str) -> NDArray[np.int64]:
    """Return a timestamp or date column as int64 µs since 1970 UTC; null is ``NO_TIME``.

    Raises:
        SchemaError: No such column, or it holds no timestamps.
    """
    values = column(table, name, where)
    if not (pa.types.is_timestamp(values.type) or pa.types.is_date(values.type)):
        raise wrong_type(name, "timestamp", values.type, where)
    whole = to_instants(values, where).cast(pa.int64())
    return np.asarray(pc.fill_null(whole, NO_TIME).to_numpy(), np.int64)


def numbers(
    table: pa.Table, name: str, where: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return a numeric or bool column as float64, and which of its values are not null.

    A null's place holds 0.0. NaN is a value, not a null.

    Raises:
        SchemaError: No such column, or it holds no numbers.
    """
    values = column(table, name, where)
    kind = values.type
    fits = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not fits and not pa.types.is_null(kind):
        raise wrong_type(name, "a number", kind, where)
    if pa.types.is_boolean(kind):
        values = values.cast(pa.uint8())
    valid = np.asarray(values.is_valid().to_numpy(), np.bool_)
    filled = pc.fill_null(values.cast(pa.float64(), safe=False), 0.0)
    return np.asarray(filled.to_numpy(), np.float64), valid


def key_columns(table: pa.Table, keys: Mapping[str, str], where: str) -> list[pa.ChunkedArray]:
    """Return the entity's key columns in the declared order and types, string or int64.

    Raises:
        SchemaError: A key column is missing or has another type: ``1`` and ``"1"`` are not equal.
    """
    columns = []
    for name, dtype in keys.items():
        values = column(table, name, where)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
        whole = pa.types.is_integer(values.type)
        fits = text if dtype == "string" else whole
        if not fits and not pa.types.is_null(values.type):
            raise wrong_type(name, dtype, values.type, where)
        columns.append(values.cast(KEY_TYPES[dtype]))
    return columns


def encode(columns: Sequence[pa.ChunkedArray]) -> tuple[NDArray[np.int64], list[pa.Array]]:
    """Number the distinct keys 0, 1, … in order of first appearance.

    Returns:
        The code of each row, −1 where any key column is null, and the distinct keys by column.
    """
    parts = [_encode_one(values) for values in columns]
    if len(parts) == 1:
        return parts[0][0], [parts[0][1]]
    combined = np.zeros(len(parts[0][0]), np.int64)
    known = np.ones(len(combined), np.bool_)
    for codes, distinct in parts:
        known &= codes >= 0
        combined = np.unique(combined * max(len(distinct), 1) + codes, return_inverse=True)[1]
    rows = np.flatnonzero(known)
    _, first, inverse = np.unique(combined[rows], return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    result = np.full(len(combined), -1, np.int64)
    result[rows] = rank[inverse]
    origin = rows[first[order]]
    return result, [distinct.take(pa.array(codes[origin])) for codes, distinct in parts]


def _encode_one(values: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.Array]:
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    encoded = array.dictionary_encode()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1)
    return np.asarray(codes.to_numpy(), np.int64), encoded.dictionary


def wrong_type(name: str, expected: str, found: Any, where: str) -> SchemaError:
    """Make the error for a column of another type than declared."""
    return SchemaError(
        f"column {name!r} has the wrong type: expected {expected}, found {found}",
        where=where,
        fix=f"convert {name!r} in the source's clean function, or correct the declaration",
    )
