"""Events: rows that come one by one, checked against declared columns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, TypeAlias

import pyarrow as pa

from mlops_ray.config.features import DType, Source
from mlops_ray.errors import RequestError, SchemaError
from mlops_ray.features.columns import INSTANT, NO_TIME, instants, to_instants
from mlops_ray.features.definitions import ARROW_TYPES

RECEIVED_AT = "received_at"
"""From when on an event was known here. Of one source, it never goes back."""

FETCHED_AT = "fetched_at"
"""When a run began to fetch a message: everything that was sent before is here."""

COMPLETE_UNTIL = b"mlops-ray-complete-until-us"
"""Metadata of a table's schema: up to when no event can be missing, though none came of late."""

_PYTHON: dict[DType, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "timestamp": (datetime, str),
}
_NAMES: dict[DType, str] = {
    "string": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "timestamp": "a timestamp in ISO 8601",
}
_NONE = type(None)

Rows: TypeAlias = "pa.Table | Sequence[Mapping[str, Any]]"


def event_schema(columns: Mapping[str, DType]) -> pa.Schema:
    """Return the schema of a pushed source's raw rows: its columns, then ``received_at``."""
    fields = [(name, ARROW_TYPES[dtype]) for name, dtype in columns.items()]
    return pa.schema([*fields, (RECEIVED_AT, INSTANT)])


def complete_until(source: Source, table: pa.Table) -> int | None:
    """Return up to when no event can be missing in a source's table, in µs; None where that is told
    by nothing: what is not an event is in the table whenever it is available.
    """
    if not source.streams:
        return None
    told = (table.schema.metadata or {}).get(COMPLETE_UNTIL)
    if told is not None:
        return int(told)
    name = FETCHED_AT if source.kafka is not None else RECEIVED_AT
    moments = instants(table, name, "events")
    return int(moments.max()) if len(moments) else NO_TIME


def check_events(columns: Mapping[str, DType], rows: Rows) -> pa.Table:
    """Return events as a table with exactly the declared columns; one left out is null.

    Types are exact: a string is no number, ``1.5`` no int, ``true`` no int. A timestamp is a datetime
    or ISO 8601 text; a naive one is UTC.

    Args:
        columns: The declared columns.
        rows: Mappings from column to value, or a table whose columns have the declared types.

    Raises:
        RequestError: A column is not declared or a value has the wrong type; ``field`` and ``row``
            say where.
    """
    if isinstance(rows, pa.Table):
        return _check_table(columns, rows)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise _refused("an event must be an object", None, number)
        if not columns.keys() >= row.keys():
            raise _unknown(next(name for name in row if name not in columns), columns, number)
    return pa.table(
        [_column(name, dtype, [row.get(name) for row in rows]) for name, dtype in columns.items()],
        schema=pa.schema([(name, ARROW_TYPES[dtype]) for name, dtype in columns.items()]),
    )


def _check_table(columns: Mapping[str, DType], table: pa.Table) -> pa.Table:
    try:
        # Offsets beyond the data and bytes that are no UTF-8 would end the process later on.
        table.validate(full=True)
    except pa.ArrowException as error:
        raise _refused(f"the table is broken: {error}", None, None) from error
    arrays = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        if name not in columns:
            raise _unknown(name, columns, None)
        arrays[name] = _cast(name, columns[name], values)
    return pa.table(
        {
            name: arrays.get(name, pa.nulls(table.num_rows, ARROW_TYPES[dtype]))
            for name, dtype in columns.items()
        }
    )


def _cast(name: str, dtype: DType, values: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    fits = {
        "string": pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "int": pa.types.is_integer(kind),
        "float": pa.types.is_floating(kind) or pa.types.is_integer(kind),
        "bool": pa.types.is_boolean(kind),
        "timestamp": pa.types.is_timestamp(kind) or pa.types.is_date(kind),
    }
    if not fits[dtype] and not pa.types.is_null(kind):
        raise _refused(f"must be {_NAMES[dtype]}, is {kind}", name, None)
    try:
        if dtype == "timestamp":
            return to_instants(values, name)
        return values.cast(ARROW_TYPES[dtype])
    except (pa.ArrowException, SchemaError) as error:
        raise _refused(str(error), name, None) from error


def _column(name: str, dtype: DType, values: list[Any]) -> pa.Array:
    allowed = {*_PYTHON[dtype], _NONE}
    if not {type(value) for value in values} <= allowed:
        values = [_exact(name, dtype, value, row) for row, value in enumerate(values)]
    if dtype == "timestamp":
        values = [_instant(name, value, row) for row, value in enumerate(values)]
    try:
        return pa.array(values, ARROW_TYPES[dtype])
    except (pa.ArrowException, OverflowError) as error:
        raise _refused(str(error), name, _first_bad(values, dtype)) from error


def _exact(name: str, dtype: DType, value: Any, row: int) -> Any:
    """Return a value of an allowed class, such as numpy's scalars and subclasses stand for."""
    plain = value.item() if hasattr(value, "item") else value
    boolean = isinstance(plain, bool)
    if plain is None or (isinstance(plain, _PYTHON[dtype]) and boolean == (dtype == "bool")):
        return plain
    if dtype == "timestamp" and type(plain) is date:
        return datetime(plain.year, plain.month, plain.day, tzinfo=UTC)
    raise _refused(f"must be {_NAMES[dtype]}, is {type(value).__name__}", name, row)


def _instant(name: str, value: Any, row: int) -> datetime | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            wrong = f"must be {_NAMES['timestamp']}, is {value[:40]!r}"
            raise _refused(wrong, name, row) from None
    if value is None:
        return None
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)


def _first_bad(values: list[Any], dtype: DType) -> int | None:
    for row, value in enumerate(values):
        try:
            pa.array([value], ARROW_TYPES[dtype])
        except (pa.ArrowException, OverflowError):
            return row
    return None


def _unknown(name: Any, columns: Mapping[str, DType], row: int | None) -> RequestError:
    near = difflib.get_close_matches(str(name), columns, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(columns)}"
    return _refused(f"is no declared field; {hint}", str(name), row)


def _refused(what: str, name: str | None, row: int | None) -> RequestError:
    place = [f"row {row}"] if row is not None else []
    place += [name] if name is not None else []
    return RequestError(f"{', '.join(place)}: {what}", field=name, row=row)
