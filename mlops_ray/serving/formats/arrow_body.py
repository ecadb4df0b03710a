"""Arrow streams from strangers: read only where they cannot be larger than they look."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pyarrow as pa

from mlops_ray.errors import RequestError
from mlops_ray.serving.formats.refusal import refusal

_RECORD_BATCH = "record batch"
_SCHEMA = "schema"
_COMPRESSED = "compressed record batch"
_COMPRESSION_SLOT = 10
_HEADER_SLOT = 8
_SHOWN = 80
_PLAIN = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_timestamp,
)


def read_stream(body: bytes) -> pa.Table:
    """Return the table of an Arrow IPC stream.

    Only plain columns are taken: booleans, numbers, strings, timestamps, without compression. Of
    others (dictionaries, runs, nulls) a body of a few kilobytes may stand for gigabytes, and so may
    it where columns lie on top of each other.

    Raises:
        RequestError: 400 where it is no Arrow stream, 422 where it is one of those refused.
    """
    try:
        kinds = list(_kinds(body))
        if not kinds or kinds[0] != _SCHEMA:
            raise pa.ArrowInvalid("it does not begin with a schema")
        if _COMPRESSED in kinds:
            raise RequestError("send the Arrow stream without compression")
        stream = pa.ipc.open_stream(body)
        for field in stream.schema:
            # A name or a zone that is no text fails here, rather than where it is first used.
            name, kind, _ = field.name, field.type, getattr(field.type, "tz", None)
            if not _is_plain(kind):
                raise refusal(f"must be a plain type, not {str(kind)[:_SHOWN]}", name)
        table = stream.read_all()
        # Lengths and offsets that point out of the body must not be followed.
        table.validate()
        if table.nbytes > len(body):
            raise pa.ArrowInvalid("its columns have bytes in common")
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError, struct.error, IndexError, UnicodeError) as error:
        raise RequestError(f"the body is no Arrow stream: {error}", status=400) from error


def _kinds(body: bytes) -> Iterator[str]:
    """Yield the kind of each message; nothing is decoded."""
    reader = pa.ipc.MessageReader.open_stream(body)
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        compressed = message.type == _RECORD_BATCH and _is_compressed(message.metadata.to_pybytes())
        yield _COMPRESSED if compressed else message.type


def _is_plain(kind: pa.DataType) -> bool:
    return any(is_one(kind) for is_one in _PLAIN)


def _is_compressed(metadata: bytes) -> bool:
    """Say whether a record batch has a body compression: RecordBatch's field 3 in Arrow's Message.fbs.

    pyarrow shows it only by decoding. A flatbuffer's table begins with the distance to the list of
    where its fields are, whose first number is the list's own length.
    """
    message = struct.unpack_from("<I", metadata, 0)[0]
    header = message + _slot(metadata, message, _HEADER_SLOT)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return _slot(metadata, batch, _COMPRESSION_SLOT) != 0


def _slot(metadata: bytes, table: int, place: int) -> int:
    fields = table - struct.unpack_from("<i", metadata, table)[0]
    if struct.unpack_from("<H", metadata, fields)[0] <= place:
        return 0
    found: int = struct.unpack_from("<H", metadata, fields + place)[0]
    return found
