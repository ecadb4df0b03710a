"""Frames: what a replica writes to its log in one piece, and how they are found in a file again.

A frame is a head of 24 bytes and a payload. The head is magic, length of the payload, sequence number,
CRC-32 of the payload, CRC-32 of the head before it, all little-endian. The payload is four parts,
each with its length before it; see ``Frame``. A part is an Arrow IPC stream or JSON, and empty where
there is nothing to say.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO

import orjson
import pyarrow as pa
from pyarrow import ipc

from mlops_ray.metadata.profile import Profile

Counts = dict[str, dict[str, Profile]]
"""Counts of features by the digest of the reference that they were binned with, and by UTC day."""

MAGIC = b"\x9dPL\x01"

_HEAD = struct.Struct("<4sIQI")
_CHECK = struct.Struct("<I")
_HEAD_BYTES = _HEAD.size + _CHECK.size
_PARTS = 4
_SEARCH_BYTES = 1 << 20
_COMPRESSED = ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Frame:
    """One frame, read lazily. ``sequence`` counts the frames of a replica, from 1."""

    sequence: int
    _parts: tuple[memoryview, ...]

    @cached_property
    def predictions(self) -> pa.Table | None:
        """Rows to keep, with ``layout.PREDICTIONS`` and the structs ``features`` and ``inputs``."""
        return _table(self._parts[0])

    @cached_property
    def others(self) -> pa.Table | None:
        """Rows that sampling leaves out, with the columns of ``delta.prediction_schema``."""
        return _table(self._parts[1])

    @cached_property
    def labels(self) -> pa.Table | None:
        """Labels in the order in which they came, with ``layout.LABELS``."""
        return _table(self._parts[2])

    @cached_property
    def counts(self) -> Counts:
        """Counts of the features of all rows, those that sampling leaves out too."""
        told = orjson.loads(self._parts[3]) if self._parts[3] else {}
        return {
            digest: {day: Profile.from_json(profile) for day, profile in days.items()}
            for digest, days in told.items()
        }


def encode(
    sequence: int,
    predictions: pa.Table | None,
    others: pa.Table | None,
    labels: pa.Table | None,
    counts: Mapping[str, Mapping[str, Profile]],
) -> bytes:
    """Return the bytes of a frame."""
    told = {
        digest: {day: {"rows": p.rows, "counts": dict(p.counts)} for day, p in days.items()}
        for digest, days in counts.items()
    }
    parts = [
        *(_stream(table) for table in (predictions, others, labels)),
        orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY) if told else b"",
    ]
    payload = b"".join(piece for part in parts for piece in (_CHECK.pack(len(part)), part))
    head = _HEAD.pack(MAGIC, len(payload), sequence, zlib.crc32(payload))
    return b"".join((head, _CHECK.pack(zlib.crc32(head)), payload))


def read_frames(file: IO[bytes], after: int = 0) -> Iterator[Frame]:
    """Yield the whole frames of a file with a sequence number beyond ``after``, in order.

    What is not whole is passed over: the torn end of a file, and a damaged frame between others.
    """
    at = 0
    while True:
        file.seek(at)
        head = _head(file.read(_HEAD_BYTES))
        if head is not None:
            length, sequence, checksum = head
            whole = sequence <= after
            if not whole:
                payload = file.read(length)
                whole = len(payload) == length and zlib.crc32(payload) == checksum
                if whole:
                    yield Frame(sequence, _split(memoryview(payload)))
                    after = sequence
            if whole:
                at += _HEAD_BYTES + length
                continue
        found = _next_magic(file, at + 1)
        if found is None:
            return
        at = found


def _head(data: bytes) -> tuple[int, int, int] | None:
    """Return length, sequence number and checksum, or None where no frame begins."""
    if len(data) < _HEAD_BYTES or not data.startswith(MAGIC):
        return None
    if zlib.crc32(data[: _HEAD.size]) != _CHECK.unpack_from(data, _HEAD.size)[0]:
        return None
    _, length, sequence, checksum = _HEAD.unpack_from(data)
    return length, sequence, checksum


def _next_magic(file: IO[bytes], at: int) -> int | None:
    while True:
        file.seek(at)
        data = file.read(_SEARCH_BYTES)
        found = data.find(MAGIC)
        if found >= 0:
            return at + found
        if len(data) < _SEARCH_BYTES:
            return None
        at += len(data) - len(MAGIC) + 1


def _split(payload: memoryview) -> tuple[memoryview, ...]:
    parts, at = [], 0
    for _ in range(_PARTS):
        (length,) = _CHECK.unpack_from(payload, at)
        at += _CHECK.size
        parts.append(payload[at : at + length])
        at += length
    return tuple(parts)


def _stream(table: pa.Table | None) -> bytes:
    if table is None or not table.num_rows:
        return b""
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, table.schema, options=_COMPRESSED) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def _table(part: memoryview) -> pa.Table | None:
    return ipc.open_stream(pa.py_buffer(part)).read_all() if part else None
