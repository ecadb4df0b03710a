"""A durable log of events: what was acknowledged is there after a crash, once.

A log is a folder of numbered segments. ``000001.arrow`` is a sealed one, an Arrow file.
``000002.log`` is the one that is written to: records, each of eight bytes (length and CRC-32,
little-endian) and an Arrow message; the first is the schema, the others are record batches. A
record that a crash cut short ends the log: it was never acknowledged. A full segment is sealed by
writing it as an Arrow file under its number.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

from mlops_ray.errors import FeatureStoreError, SourceError
from mlops_ray.features.sources.batches import Batches
from mlops_ray.metadata.files import sync

logger = logging.getLogger(__name__)

_SEALED, _OPEN = ".arrow", ".log"
_HEAD = struct.Struct("<II")
_FULL_BYTES = 32 << 20
_FULL_RECORDS = 4096


def read_log(folder: Path, schema: pa.Schema, where: str = "log") -> Batches:
    """Return all events of a log, in order; a column that older ones lack is null in them.

    It may be read while it is written to.

    Raises:
        SourceError: A column was stored with another type than it has in ``schema``.
    """

    def flow() -> Iterator[pa.RecordBatch]:
        for number in _numbers(folder):
            for batch in _segment(folder, number):
                yield _as(batch, schema, where)

    return Batches(schema, flow())


class EventLog:
    """Writes to a log; one process at a time.

    Args:
        folder: Of the log; made when it is not there.
        schema: Of the events.

    Raises:
        FeatureStoreError: Another process writes to this log.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._schema = schema
        self._lock = _lock(folder)
        self._number = max(_numbers(folder), default=0)
        self._records = self._bytes = 0
        self._file: IO[bytes] | None = None
        for number in _numbers(folder):
            self._seal(number)

    def append(self, events: pa.Table) -> None:
        """Append events; they are on disk when this returns."""
        if not events.num_rows:
            return
        (batch,) = events.cast(self._schema).combine_chunks().to_batches()
        try:
            if self._file is None:
                self._open_next()
            assert self._file is not None
            self._put(batch.serialize())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file = None
            raise FeatureStoreError(
                "the events could not be stored",
                where=str(self._folder),
                why=str(error),
                fix="free some space; what was not acknowledged is to be sent again",
            ) from error
        if self._records >= _FULL_RECORDS or self._bytes >= _FULL_BYTES:
            self.close_segment()

    def close_segment(self) -> None:
        """Seal the segment that is written to, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None
            try:
                self._seal(self._number)
            except OSError:
                # All of its events are on disk, and are read and sealed from there later.
                logger.warning(
                    "a full segment of %s is not sealed yet", self._folder, exc_info=True
                )

    def close(self) -> None:
        """Let another process write to this log."""
        self.close_segment()
        self._lock.close()

    def _open_next(self) -> None:
        self._number += 1
        self._records = self._bytes = 0
        self._file = (self._folder / _name(self._number, _OPEN)).open("wb")
        self._put(self._schema.serialize())
        sync(self._folder)

    def _put(self, message: pa.Buffer) -> None:
        assert self._file is not None
        self._file.write(_HEAD.pack(message.size, zlib.crc32(message)))
        self._file.write(message)
        self._records += 1
        self._bytes += message.size

    def _seal(self, number: int) -> None:
        path = self._folder / _name(number, _OPEN)
        if not path.exists():
            return
        # A killed process may have left a segment both ways; the sealed one is whole.
        if not (self._folder / _name(number, _SEALED)).exists():
            schema, batches = _read_open(path)
            write_segment(self._folder, number, pa.Table.from_batches(batches, schema))
        path.unlink()


def write_segment(folder: Path, number: int, events: pa.Table | Batches) -> int:
    """Write a sealed segment, whole or not at all; return its number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _name(number, _SEALED)
    staged = folder / f".{target.name}"
    rows = 0
    with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, events.schema) as writer:
        for batch in _whole(events):
            writer.write_batch(batch)
            rows += batch.num_rows
    sync(staged)
    staged.rename(target)
    sync(folder)
    return rows


def _whole(events: pa.Table | Batches) -> Iterator[pa.RecordBatch]:
    if isinstance(events, pa.Table):
        return iter(events.combine_chunks().to_batches())
    return events.batches


def newest_segment(folder: Path) -> tuple[int, pa.Table | None]:
    """Return the number of the newest segment, 0 for none, and its rows where it is sealed."""
    number = max(_numbers(folder), default=0)
    path = folder / _name(number, _SEALED)
    return number, _open_sealed(path) if path.exists() else None


def _segment(folder: Path, number: int) -> Iterator[pa.RecordBatch]:
    try:
        yield from _open_sealed(folder / _name(number, _SEALED)).to_batches()
    except FileNotFoundError:
        # It is the open one, or was until a moment ago.
        try:
            batches = _read_open(folder / _name(number, _OPEN))[1]
        except FileNotFoundError:
            batches = _open_sealed(folder / _name(number, _SEALED)).to_batches()
        yield from batches


def _open_sealed(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _read_open(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Return the whole records of a segment that is or was written to."""
    content = memoryview(path.read_bytes())
    schema, batches, start = pa.schema([]), [], 0
    while start + _HEAD.size <= len(content):
        length, checksum = _HEAD.unpack_from(content, start)
        message = content[start + _HEAD.size : start + _HEAD.size + length]
        if len(message) < length or zlib.crc32(message) != checksum:
            break
        if start == 0:
            schema = pa.ipc.read_schema(pa.py_buffer(message))
        else:
            batches.append(pa.ipc.read_record_batch(pa.py_buffer(message), schema))
        start += _HEAD.size + length
    return schema, batches


def _as(batch: pa.RecordBatch, schema: pa.Schema, where: str) -> pa.RecordBatch:
    if batch.schema.equals(schema):
        return batch
    columns = []
    for field in schema:
        at = batch.schema.get_field_index(field.name)
        if at < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
        elif batch.schema.field(at).type == field.type:
            columns.append(batch.column(at))
        else:
            raise SourceError(
                f"events have {field.name!r} stored as {batch.schema.field(at).type}, "
                f"and it is declared as {field.type} now",
                where=where,
                fix="declare the type that it had, or give the column a new name",
            )
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    stems = {file.stem for file in folder.iterdir() if file.suffix in (_SEALED, _OPEN)}
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _name(number: int, suffix: str) -> str:
    return f"{number:06d}{suffix}"


def _lock(folder: Path) -> IO[bytes]:
    lock = (folder / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise FeatureStoreError(
            "another process writes to this log",
            where=str(folder),
            fix="send the events to that process: there is one writer for each project",
        ) from error
    return lock
