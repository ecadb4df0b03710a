"""Rows on their way: a schema and record batches, of which only a few are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from mlops_ray.features.columns import INSTANT, to_instants


@dataclass(frozen=True)
class Batches:
    """Record batches that can be gone through once.

    ``schema`` is that of the first one. Later ones may know the type of a column that is all null in
    the first.
    """

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]

    @staticmethod
    def of(table: pa.Table) -> Batches:
        """Return the batches of a table."""
        return Batches(table.schema, iter(table.to_batches()))

    @staticmethod
    def from_first(tables: Iterable[pa.Table]) -> Batches:
        """Return the batches of some tables, of which there is at least one; the first is made now."""
        waiting = iter(tables)
        first = next(waiting)

        def flow() -> Iterator[pa.RecordBatch]:
            yield from first.to_batches()
            for table in waiting:
                yield from table.to_batches()

        return Batches(first.schema, flow())

    def normalised(self) -> Batches:
        """Return them with every timestamp as ``timestamp[us, UTC]`` and nothing dictionary-encoded."""
        fields = [field.with_type(_normal_type(field.type)) for field in self.schema]
        return Batches(pa.schema(fields), (normalise(batch) for batch in self.batches))

    def read_all(self) -> pa.Table:
        """Return all rows as one table."""
        tables = [pa.Table.from_batches([batch]) for batch in self.batches]
        return pa.concat_tables([self.schema.empty_table(), *tables], promote_options="default")


def normalise(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch with timestamps as ``timestamp[us, UTC]``, naive ones were UTC; none encoded.

    Raises:
        SchemaError: A time is too far away for whole microseconds in 64 bits.
    """
    columns, fields = [], []
    for values, field in zip(batch.columns, batch.schema, strict=True):
        kind = _normal_type(field.type)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_timestamp(values.type) and values.type != INSTANT:
            values = to_instants(values, field.name)
        columns.append(values)
        fields.append(pa.field(field.name, kind))
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _normal_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _normal_type(kind.value_type)
    return INSTANT if pa.types.is_timestamp(kind) else kind
