"""Reading pieces of Parquet files, those of a Delta table too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlops_ray.errors import SourceError
from mlops_ray.serving.batch.pieces import Chunk, Piece, cut

_DICTIONARIES = frozenset({"PLAIN_DICTIONARY", "RLE_DICTIONARY"})
_BESIDE_THEM = frozenset({"PLAIN", "RLE"})
"""Encodings of a dictionary's own values, and of nulls."""


@dataclass(frozen=True)
class ColumnarReader:
    """Reads Parquet files; ``schema`` is that of all of them.

    Chunks have it too, but for texts that repeat much: those come as dictionaries, as they lie in the
    file.
    """

    filesystem: Any
    schema: pa.Schema

    def read(
        self, piece: Piece, batch_rows: int, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """Yield the rows of a piece in order, at most ``batch_rows`` at a time.

        Raises:
            SourceError: The file is damaged, or not what it was when it was cut.
        """
        schema = (
            self.schema if columns is None else pa.schema([self.schema.field(c) for c in columns])
        )
        try:
            place = piece.first
            for batch in _rows(self.filesystem, piece, batch_rows, schema):
                table = _conform(batch, schema, piece)
                yield Chunk(table, np.arange(place, place + table.num_rows))
                place += table.num_rows
        except (pa.ArrowException, OSError) as error:
            raise unreadable(piece.file, error) from error
        if place - piece.first != piece.rows:
            raise SourceError(
                "the file has other rows than when the batch began",
                where=piece.file,
                fix="leave the input alone while it is scored, and run it again",
            )


def read_schema(filesystem: Any, files: Sequence[str]) -> pa.Schema:
    """Return the columns that files have together.

    Raises:
        SourceError: One is no Parquet, or a column has two types.
    """
    schemas = []
    for file in files:
        try:
            with pq.ParquetFile(file, filesystem=filesystem) as opened:
                schemas.append(opened.schema_arrow.remove_metadata())
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file, error) from error
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise unreadable(files[0], error) from error


def pieces_of(
    filesystem: Any, files: Sequence[tuple[str, dict[str, Any]]], piece_rows: int
) -> list[Piece]:
    """Cut files, each given with the values that its folder tells, into pieces."""
    pieces: list[Piece] = []
    first = 0
    for file, values in files:
        with pq.ParquetFile(file, filesystem=filesystem) as opened:
            known = opened.metadata
            groups = [known.row_group(n).num_rows for n in range(known.num_row_groups)]
        for start, rows in cut(groups, piece_rows):
            pieces.append(
                Piece(
                    number=len(pieces),
                    first=first + start,
                    rows=rows,
                    file=file,
                    start=start,
                    values=values,
                )
            )
        first += sum(groups)
    return pieces


def unreadable(file: str, error: Exception) -> SourceError:
    """Make the error for a file that cannot be read."""
    return SourceError(
        "the input cannot be read",
        where=file,
        why=str(error).strip(),
        fix="check that the file is whole, and its format",
    )


def _rows(
    filesystem: Any, piece: Piece, batch_rows: int, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    with filesystem.open_input_file(piece.file) as source:
        metadata = pq.read_metadata(source)
        wanted, skip, left = _groups(metadata, piece)
        texts = _repetitive(metadata, wanted, schema, batch_rows)
        file = pq.ParquetFile(source, metadata=metadata, read_dictionary=texts)
        here = [name for name in schema.names if name in file.schema_arrow.names]
        batches = file.iter_batches(batch_rows, row_groups=wanted, columns=here, use_threads=False)
        for batch in batches:
            used = batch.slice(skip, left)
            skip -= min(skip, batch.num_rows)
            left -= used.num_rows
            if used.num_rows:
                yield used
            if not left:
                return


def _groups(metadata: Any, piece: Piece) -> tuple[list[int], int, int]:
    """Return the row groups in which a piece lies, how many of their rows come before it, and how
    many it has."""
    ends = np.cumsum([metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)])
    begins = np.concatenate([[0], ends[:-1]])
    wanted = np.flatnonzero((ends > piece.start) & (begins < piece.start + piece.rows))
    skip = int(piece.start - begins[wanted[0]]) if len(wanted) else 0
    return wanted.tolist(), skip, piece.rows


def _repetitive(
    metadata: Any, groups: Sequence[int], schema: pa.Schema, batch_rows: int
) -> list[str]:
    """Return the text columns to be read as dictionaries: those that are dictionaries in the file,
    and take less than a byte a row, so that they have few different values.

    None where row groups are smaller than batches: no batch would go beyond its group.
    """
    bytes_of: Counter[str] = Counter()
    others: set[str] = set()
    rows = 0
    for number in groups:
        group = metadata.row_group(number)
        rows += group.num_rows
        for place in range(group.num_columns):
            chunk = group.column(place)
            bytes_of[chunk.path_in_schema] += chunk.total_uncompressed_size
            found = _DICTIONARIES.intersection(chunk.encodings)
            if not found or not found | _BESIDE_THEM >= set(chunk.encodings):
                others.add(chunk.path_in_schema)
    if rows < batch_rows * len(groups):
        return []
    texts = (field.name for field in schema if pa.types.is_string(field.type))
    return [name for name in texts if 0 < bytes_of[name] < rows and name not in others]


def _conform(batch: pa.RecordBatch, schema: pa.Schema, piece: Piece) -> pa.Table:
    columns = []
    for place, field in enumerate(schema):
        if field.name in batch.schema.names:
            values = batch.column(field.name)
            if pa.types.is_dictionary(values.type) and values.type.value_type == field.type:
                schema = schema.set(place, field.with_type(values.type))
            elif values.type != field.type:
                values = values.cast(field.type)
            columns.append(values)
        else:
            value = pa.scalar(piece.values.get(field.name)).cast(field.type)
            columns.append(pa.repeat(value, batch.num_rows))
    return pa.Table.from_arrays(columns, schema=schema)
