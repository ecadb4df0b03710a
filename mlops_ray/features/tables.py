"""Several tables as one artifact: a folder with an Arrow file for each source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from mlops_ray.errors import SourceError

_SUFFIX = ".arrow"
_CHUNK_ROWS = 1 << 17


def write_tables(folder: Path, tables: Mapping[str, pa.Table]) -> Path:
    """Write each table to ``folder/<name>.arrow``; equal tables give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        with (
            pa.OSFile(str(folder / f"{name}{_SUFFIX}"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table.combine_chunks(), max_chunksize=_CHUNK_ROWS)
    return folder


def read_tables(folder: Path) -> dict[str, pa.Table]:
    """Read what ``write_tables`` wrote, memory-mapped.

    Raises:
        SourceError: The folder holds no tables.
    """
    tables = {}
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        with pa.memory_map(str(file)) as source:
            tables[file.stem] = pa.ipc.open_file(source).read_all()
    if not tables:
        raise SourceError("there are no tables in this folder", where=str(folder))
    return tables
