"""Frames: what a replica writes to its log in one piece, and how they are found in a file again.

A file begins with 20 bytes, a magic and a random key; frames follow. A frame is a head of 28 bytes and
a payload. The head is magic, length of the payload, sequence number, CRC-32 of the payload, and the
BLAKE2b digest, of 8 bytes, of the head before it under the file's key, all little-endian. So nothing
that a client has put into a payload can pass for a frame: it does not know the key. The payload is four
parts, each with its length before it; see ``Frame``. A part is an Arrow IPC stream or JSON, and empty
where there is nothing to say.
"""

from __future__ import annotations

import hashlib
import secrets
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

MAGIC = b"\x9dPL\x02"

_FILE_MAGIC = b"\x9dPLF"
_KEY_BYTES = 16
_FILE_HEAD_BYTES = len(_FILE_MAGIC) + _KEY_BYTES
_HEAD = struct.Struct("<4sIQI")
_SEAL_BYTES = 8
_HEAD_BYTES = _HEAD.size + _SEAL_BYTES
_LENGTH = struct.Struct("<I")
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


def file_head() -> bytes:
    """Return what a new file begins with, unlike any other's."""
    return _FILE_MAGIC + secrets.token_bytes(_KEY_BYTES)


def sealed(frame: bytes, head: bytes) -> bytes:
    """Return the bytes of an encoded frame as they stand in the file that begins with ``head``."""
    bare = frame[: _HEAD.size]
    return b"".join((bare, _seal(bare, head[len(_FILE_MAGIC) :]), frame[_HEAD.size :]))


def encode(
    sequence: int,
    predictions: pa.Table | None,
    others: pa.Table | None,
    labels: pa.Table | None,
    counts: Mapping[str, Mapping[str, Profile]],
) -> bytes:
    """Return the bytes of a frame, to be ``sealed`` for the file that it goes to."""
    told = {
        digest: {day: {"rows": p.rows, "counts": dict(p.counts)} for day, p in days.items()}
        for digest, days in counts.items()
    }
    parts = [
        *(_stream(table) for table in (predictions, others, labels)),
        orjson.dumps(told, option=orjson.OPT_SERIALIZE_NUMPY) if told else b"",
    ]
    payload = b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))
    return _HEAD.pack(MAGIC, len(payload), sequence, zlib.crc32(payload)) + payload


def read_frames(file: IO[bytes], after: int = 0) -> Iterator[Frame]:
    """Yield the whole frames of a file with a sequence number beyond ``after``, in order.

    What is not whole is passed over: the torn end of a file, and a damaged frame between others. A
    file whose first 20 bytes are damaged holds nothing that can be told from forgery.
    """
    file.seek(0)
    start = file.read(_FILE_HEAD_BYTES)
    if len(start) < _FILE_HEAD_BYTES or not start.startswith(_FILE_MAGIC):
        return
    key, at = start[len(_FILE_MAGIC) :], _FILE_HEAD_BYTES
    while True:
        file.seek(at)
        head = _head(file.read(_HEAD_BYTES), key)
        if head is not None:
            length, sequence, checksum = head
            whole = sequence <= after
            if not whole:
                parts = _parts_of(file.read(length), length, checksum)
                whole = parts is not None
                if parts is not None:
                    yield Frame(sequence, parts)
                    after = sequence
            if whole:
                at += _HEAD_BYTES + length
                continue
        found = _next_magic(file, at + 1)
        if found is None:
            return
        at = found


def _seal(head: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(head, key=key, digest_size=_SEAL_BYTES).digest()


def _head(data: bytes, key: bytes) -> tuple[int, int, int] | None:
    """Return length, sequence number and checksum, or None where no frame begins."""
    if len(data) < _HEAD_BYTES or not data.startswith(MAGIC):
        return None
    if _seal(data[: _HEAD.size], key) != data[_HEAD.size :]:
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


def _parts_of(payload: bytes, length: int, checksum: int) -> tuple[memoryview, ...] | None:
    """Return the parts of a payload, None where it is damaged."""
    if len(payload) != length or zlib.crc32(payload) != checksum:
        return None
    view = memoryview(payload)
    parts, at = [], 0
    for _ in range(_PARTS):
        if at + _LENGTH.size > length:
            return None
        (size,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        parts.append(view[at : at + size])
        at += size
    return tuple(parts) if at == length else None


def _stream(table: pa.Table | None) -> bytes:
    if table is None or not table.num_rows:
        return b""
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, table.schema, options=_COMPRESSED) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def _table(part: memoryview) -> pa.Table | None:
    return ipc.open_stream(pa.py_buffer(part)).read_all() if part else None
