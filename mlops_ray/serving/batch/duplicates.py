"""Ids that come more than once, found in a memory that does not grow with the input."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mlops_ray.features.columns import encode
from mlops_ray.features.keys import key_hash
from mlops_ray.serving.batch.inputs import Reader
from mlops_ray.serving.batch.pieces import Piece, Rows

_BUCKET_ROWS = 2_000_000
_SCHEMA = pa.schema([("id", pa.string()), ("row", pa.int64())])


def repeated_rows(
    reader: Reader, pieces: Sequence[Piece], column: str, batch_rows: int, folder: Path
) -> Rows:
    """Return the places of rows whose id an earlier row has, sorted. A null is nobody's id.

    The ids are read once and parted by their hash into files of ``folder``, which is removed.
    """
    count = 1 + sum(piece.rows for piece in pieces) // _BUCKET_ROWS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        files = [folder / f"{number}.arrow" for number in range(count)]
        _part(_ids(reader, pieces, column, batch_rows), files)
        found = [_repeated(file) for file in files]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return np.sort(np.concatenate(found))


def _ids(
    reader: Reader, pieces: Sequence[Piece], column: str, batch_rows: int
) -> Iterator[pa.Table]:
    for piece in pieces:
        for chunk in reader.read(piece, batch_rows, [column]):
            ids = chunk.table[column].cast(pa.string())
            yield pa.table([ids, chunk.rows], schema=_SCHEMA).drop_null()


def _part(tables: Iterator[pa.Table], files: Sequence[Path]) -> None:
    writers: list[Any] = [pa.ipc.new_stream(str(file), _SCHEMA) for file in files]
    try:
        for table in tables:
            bucket = key_hash([table["id"]]) % np.uint64(len(files))
            for number, writer in enumerate(writers):
                mine = table if len(files) == 1 else table.filter(pa.array(bucket == number))
                writer.write_table(mine)
    finally:
        for writer in writers:
            writer.close()


def _repeated(file: Path) -> Rows:
    with pa.ipc.open_stream(str(file)) as stream:
        table = stream.read_all()
    codes, _ = encode([table["id"]])
    rows = np.asarray(table["row"])
    first = np.zeros(len(rows), np.bool_)
    first[np.unique(codes, return_index=True)[1]] = True
    return np.asarray(rows[~first], np.int64)
