"""Pieces of what a view is made from: each small enough for a task to hold, readable by any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mlops_ray.features.files import WrittenFile, read_batches
from mlops_ray.features.offline import OfflineStore

PIECE_ROWS = 1 << 18


@dataclass(frozen=True)
class ArrowPiece:
    """Record batches [start, stop) of an Arrow file."""

    path: Path
    start: int
    stop: int
    rows: int

    def read(self) -> Iterator[pa.Table]:
        """Return the rows, a bounded number at a time."""
        with pa.memory_map(str(self.path)) as source:
            file = pa.ipc.open_file(source)
            for number in range(self.start, self.stop):
                yield pa.Table.from_batches([file.get_batch(number)])


@dataclass(frozen=True)
class StoredPiece:
    """A file of another view's table."""

    folder: Path
    file: WrittenFile
    schema: pa.Schema

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.file.rows

    def read(self) -> Iterator[pa.Table]:
        """Return the rows, a bounded number at a time."""
        return read_batches(self.folder, self.file, self.schema)


Piece = ArrowPiece | StoredPiece


def pieces_of_file(path: Path) -> list[Piece]:
    """Cut an Arrow file."""
    pieces: list[Piece] = []
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        start, rows = 0, 0
        for number in range(file.num_record_batches):
            rows += file.get_batch(number).num_rows
            if rows >= PIECE_ROWS or number == file.num_record_batches - 1:
                pieces.append(ArrowPiece(path, start, number + 1, rows))
                start, rows = number + 1, 0
    return pieces


def pieces_of_view(offline: OfflineStore, view: str, schema: pa.Schema) -> list[Piece]:
    """Return the files of the newest version of a view's table."""
    folder = offline.path(view)
    return [StoredPiece(folder, file, schema) for file in offline.files(view)]
