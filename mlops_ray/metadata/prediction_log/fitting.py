"""Fields of one name and several types: each type but the first has a name of its own."""

from __future__ import annotations

import pyarrow as pa


class Fitting:
    """Gives fields of ``features`` and ``inputs`` names under which tables fit together.

    A service may declare an input anew with another type, and redacting makes text of anything. A field
    keeps its name for the type that is stored or seen first; others are called like ``shop__string``.

    Args:
        stored: The columns that there are already.
    """

    def __init__(self, stored: pa.Schema | None = None) -> None:
        self._known: dict[str, dict[str, pa.DataType]] = {}
        for column in stored or ():
            if pa.types.is_struct(column.type):
                self._known[column.name] = {field.name: field.type for field in column.type}

    def fit(self, rows: pa.Table) -> pa.Table:
        """Return the rows under names that fit those of all before."""
        for place, column in enumerate(rows.schema):
            if pa.types.is_struct(column.type):
                known = self._known.setdefault(column.name, {})
                fields = [_fitted(field, known) for field in column.type]
                if fields != list(column.type):
                    kind = pa.struct(fields)
                    chunks = [_named(chunk, kind) for chunk in rows[column.name].chunks]
                    rows = rows.set_column(place, column.name, pa.chunked_array(chunks, kind))
        return rows


def typed_name(name: str, kind: pa.DataType) -> str:
    """Return the name of a field that has another type than the field of that name."""
    return f"{name}__{str(kind).partition('[')[0]}"


def forms_of(kind: pa.StructType, name: str) -> list[pa.Field]:
    """Return the fields of a struct that hold what was logged as ``name``, of whatever type."""
    return [field for field in kind if field.name in (name, typed_name(name, field.type))]


def _fitted(field: pa.Field, known: dict[str, pa.DataType]) -> pa.Field:
    """Return the field under the name that its type has, which is known from now on."""
    if known.setdefault(field.name, field.type) != field.type:
        field = field.with_name(typed_name(field.name, field.type))
        known.setdefault(field.name, field.type)
    return field


def _named(struct: pa.StructArray, kind: pa.StructType) -> pa.StructArray:
    fields = [struct.field(place) for place in range(kind.num_fields)]
    return pa.StructArray.from_arrays(fields, fields=list(kind), mask=struct.is_null())
