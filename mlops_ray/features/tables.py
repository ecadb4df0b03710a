"""Several tables as one artifact: a folder with an Arrow file for each source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlops_ray.errors import SourceError

_SUFFIX = ".arrow"
_CHUNK_ROWS = 1 << 17


def write_tables(folder: Path, tables: Mapping[str, pa.Table]) -> Path:
    """Write each table to ``folder/<name>.arrow``; equal tables give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_table(folder, name, table.to_batches(), table.schema)
    return folder


def write_table(
    folder: Path, name: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema
) -> int:
    """Write ``folder/<name>.arrow`` batch by batch; return the number of rows.

    Equal rows give equal bytes, however they are cut into batches. A column that starts out without
    a type, as an empty one of a database does, takes the type of its first values.

    Raises:
        SourceError: Two batches cannot share one schema.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}{_SUFFIX}"
    with _Writer(target, schema) as writer:
        rows = 0
        for batch in batches:
            rows += batch.num_rows
            writer.add(batch)
    return rows


def read_tables(folder: Path) -> dict[str, pa.Table]:
    """Read what ``write_tables`` wrote, memory-mapped.

    Raises:
        SourceError: The folder holds no tables.
    """
    tables = {file.stem: open_table(file) for file in sorted(folder.glob(f"*{_SUFFIX}"))}
    if not tables:
        raise SourceError("there are no tables in this folder", where=str(folder))
    return tables


def open_table(file: Path) -> pa.Table:
    """Return the table of an Arrow file, memory-mapped: pages come in as they are used."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def table_path(folder: Path, name: str) -> Path:
    """Return the file in which ``write_table`` puts a table."""
    return folder / f"{name}{_SUFFIX}"


class _Writer:
    """Cuts what it is given into chunks of one size, so that equal rows give equal bytes."""

    def __init__(self, target: Path, schema: pa.Schema) -> None:
        self._target = target
        self._schema = schema
        self._held: list[pa.RecordBatch] = []
        self._held_rows = 0
        self._file: Any = None

    def __enter__(self) -> _Writer:
        self._open(self._schema)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._write(self._held_rows)
        self._file.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Take some more rows."""
        if batch.schema != self._schema:
            batch = self._fit(batch)
        self._held.append(batch)
        self._held_rows += batch.num_rows
        if self._held_rows >= _CHUNK_ROWS:
            self._write(self._held_rows // _CHUNK_ROWS * _CHUNK_ROWS)

    def _write(self, rows: int) -> None:
        held = pa.Table.from_batches(self._held, self._schema)
        for start in range(0, rows, _CHUNK_ROWS):
            chunk = held.slice(start, min(_CHUNK_ROWS, rows - start))
            self._file.write_batch(_copied(chunk))
        self._held = held.slice(rows).to_batches()
        self._held_rows -= rows

    def _fit(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch in the file's schema, which may have to learn a type from it."""
        try:
            schema = pa.unify_schemas([self._schema, batch.schema])
            if schema != self._schema:
                self._rewrite(schema)
            return _cast(batch, self._schema)
        except (pa.ArrowException, KeyError) as error:
            raise SourceError(
                "the rows do not share one schema",
                where=self._target.stem,
                why=f"{error}; first: {self._schema.to_string()}; later: {batch.schema.to_string()}",
                fix="give every column one type in all files, or cast it in the query",
            ) from error

    def _rewrite(self, schema: pa.Schema) -> None:
        """Write what the file holds so far once more, in a wider schema."""
        self._file.close()
        earlier = self._target.rename(self._target.with_suffix(".earlier"))
        self._open(schema)
        for chunk in open_table(earlier).to_batches():
            self._file.write_batch(_cast(chunk, schema))
        self._held = [_cast(batch, schema) for batch in self._held]
        earlier.unlink()

    def _open(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._file = pa.ipc.new_file(str(self._target), schema)


def _copied(rows: pa.Table) -> pa.RecordBatch:
    """Return rows as one batch with buffers of its own.

    A slice is written with bytes of its neighbours as padding, which would make equal rows differ.
    """
    columns = [pa.concat_arrays([*v.chunks, pa.array([], v.type)]) for v in rows.columns]
    return pa.RecordBatch.from_arrays(columns, schema=rows.schema)


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.record_batch(columns, schema=schema)
