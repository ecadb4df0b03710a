"""Writing a piece's rows to a file of its own: Parquet, CSV or JSON lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from mlops_ray.serving.batch.conversion import as_text

_GROUP_ROWS = 131_072

SUFFIXES = {"parquet": ".parquet", "csv": ".csv", "json": ".jsonl"}


class RowWriter(Protocol):
    """Takes tables of one schema."""

    def write(self, table: pa.Table) -> None:
        """Write rows."""

    def close(self) -> None:
        """Finish the file."""


class ParquetRows:
    """Writes Parquet. Only text is dictionary-encoded: numbers seldom gain by it."""

    def __init__(self, path: Path, schema: pa.Schema, header: bool) -> None:
        texts = [f.name for f in schema if pa.types.is_string(f.type) or _is_large(f.type)]
        self._writer = pq.ParquetWriter(path, schema, use_dictionary=texts)
        self._written = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._held: list[pa.Table] = []
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        """Keep rows until there are enough for a row group."""
        self._held.append(table)
        self._rows += table.num_rows
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is kept, and the footer."""
        try:
            if self._held:
                self._flush()
            self._writer.close()
        finally:
            os.close(self._written)

    def _flush(self) -> None:
        self._writer.write_table(pa.concat_tables(self._held))
        self._held, self._rows = [], 0
        if hasattr(os, "posix_fadvise"):
            # The disk begins now, so that who syncs the whole file hardly waits.
            os.posix_fadvise(self._written, 0, 0, os.POSIX_FADV_DONTNEED)


class CsvRows:
    """Writes CSV; ``header`` says whether with the columns' names."""

    def __init__(self, path: Path, schema: pa.Schema, header: bool) -> None:
        options = csv.WriteOptions(include_header=header)
        self._writer = csv.CSVWriter(str(path), schema, write_options=options)

    def write(self, table: pa.Table) -> None:
        """Write rows."""
        self._writer.write_table(table)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class JsonRows:
    """Writes an object on each line."""

    def __init__(self, path: Path, schema: pa.Schema, header: bool) -> None:
        self._file: Any = path.open("w", encoding="utf-8")

    def write(self, table: pa.Table) -> None:
        """Write rows."""
        self._file.writelines(f"{as_text(row)}\n" for row in table.to_pylist())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


WRITERS: dict[str, Callable[[Path, pa.Schema, bool], RowWriter]] = {
    "parquet": ParquetRows,
    "csv": CsvRows,
    "json": JsonRows,
}


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind) or pa.types.is_dictionary(kind))
