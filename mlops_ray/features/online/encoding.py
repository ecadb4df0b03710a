"""Entity keys as bytes: typed, unambiguous, the same in every process.

A string is ``s``, its length and its UTF-8 bytes; an integer is ``i`` and eight bytes. So 1 and "1",
and ("1", "11") and ("11", "1"), are different keys.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.errors import FeatureStoreError

_LONGEST = 400
_FEW_ROWS = 100
_FEW_VALUES = 16
_LENGTH = struct.Struct(">cI").pack
_INTEGER = struct.Struct(">cq").pack
_PART = np.dtype([("kind", "u1"), ("value", ">i8")])


def encode_keys(prefix: bytes, columns: Sequence[NDArray[Any]]) -> list[bytes | None]:
    """Return the bytes of each row's key behind ``prefix``, None where no row can have it.

    That is where a part of it is null, or a string that is no Unicode text (half a surrogate pair).

    A key that would be too long for a store is replaced by its BLAKE2b-256 digest.

    Args:
        prefix: What the keys begin with.
        columns: The entity's key columns in order, each [n].

    Raises:
        FeatureStoreError: A value is neither a string nor a whole number of 64 bits.
    """
    if len(columns) == 1 and columns[0].dtype == np.int64:
        return [prefix + part for part in _whole_parts(columns[0])]
    parts = [_parts(column) for column in columns]
    if any(None in part for part in parts):
        return [
            None if None in row else _short(prefix, b"".join((prefix, *row)))
            for row in zip(*parts, strict=True)
        ]
    keys = map(b"".join, zip(repeat(prefix, len(parts[0])), *parts, strict=True))
    return [key if len(key) <= _LONGEST else _short(prefix, key) for key in keys]


def encode_columns(prefix: bytes, columns: Sequence[pa.Array]) -> list[bytes]:
    """Return what ``encode_keys`` does, for Arrow columns without nulls: many rows at once."""
    if len(columns[0]) < _FEW_ROWS:
        arrays = [column.to_numpy(zero_copy_only=False) for column in columns]
        return [key for key in encode_keys(prefix, arrays) if key is not None]
    parts: list[pa.Array | pa.Scalar] = [pa.scalar(prefix, pa.large_binary())]
    for column in columns:
        if pa.types.is_integer(column.type):
            parts.append(_fixed(b"i", column.to_numpy(), np.dtype(">i8")))
        else:
            texts = column.cast(pa.large_binary())
            parts += [_fixed(b"s", pc.binary_length(texts).to_numpy(), np.dtype(">u4")), texts]
    keys = cut(pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.large_binary())))
    return [key if len(key) <= _LONGEST else _short(prefix, key) for key in keys]


def cut(values: pa.LargeBinaryArray) -> list[bytes]:
    """Return the values of an array without nulls."""
    _, offsets, data = values.buffers()
    bounds = np.frombuffer(offsets, np.int64)[values.offset :][: len(values) + 1].tolist()
    content = b"" if data is None else data.to_pybytes()
    return [content[begin:end] for begin, end in pairwise(bounds)]


def _fixed(kind: bytes, numbers: NDArray[Any], dtype: np.dtype[Any]) -> pa.LargeBinaryArray:
    """Return ``kind`` and the number's bytes of each row."""
    width = 1 + dtype.itemsize
    content = np.empty((len(numbers), width), np.uint8)
    content[:, 0] = ord(kind)
    content[:, 1:] = numbers.astype(dtype)[:, None].view(np.uint8)
    offsets = pa.py_buffer(np.arange(0, (len(numbers) + 1) * width, width, dtype=np.int64))
    buffers = [None, offsets, pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_binary(), len(numbers), buffers)


def _short(prefix: bytes, key: bytes) -> bytes:
    if len(key) <= _LONGEST:
        return key
    return prefix + b"h" + hashlib.blake2b(key, digest_size=32).digest()


def _parts(column: NDArray[Any]) -> list[Any]:
    if column.dtype == np.int64:
        return _whole_parts(column)
    return [_part(value) for value in column.tolist()]


def _whole_parts(column: NDArray[np.int64]) -> list[bytes]:
    if len(column) < _FEW_VALUES:
        return [_INTEGER(b"i", value) for value in column.tolist()]
    parts = np.empty(len(column), _PART)
    parts["kind"], parts["value"] = ord("i"), column
    found: list[bytes] = parts.view(f"V{_PART.itemsize}").tolist()
    return found


def _part(value: Any) -> bytes | None:
    if isinstance(value, str):
        try:
            text = value.encode()
        except UnicodeEncodeError:
            return None
        return _LENGTH(b"s", len(text)) + text
    if isinstance(value, np.integer):
        value = int(value)
    if value.__class__ is int and -(2**63) <= value < 2**63:
        return _INTEGER(b"i", value)
    if value is None or value != value:
        return None
    raise FeatureStoreError(
        f"an entity key must be a string or a whole number of 64 bits, not {value!r}"
    )
