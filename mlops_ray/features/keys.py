"""Entity keys as bytes: typed, unambiguous, the same in every process.

A string is ``s``, its length and its UTF-8 bytes; an integer is ``i`` and eight bytes. So 1 and "1",
and ("1", "11") and ("11", "1"), are different keys.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from mlops_ray.errors import FeatureStoreError

_LONGEST = 400
_LENGTH = struct.Struct(">I").pack
_INTEGER = struct.Struct(">q").pack


def encode_key(prefix: bytes, values: Sequence[Any]) -> bytes | None:
    """Return the key's bytes behind ``prefix``, or None when a value is null.

    A key that would be too long for the store is replaced by its BLAKE2b-256 digest.

    Raises:
        FeatureStoreError: A value is neither a string nor a whole number.
    """
    parts = [prefix]
    for value in values:
        if value.__class__ is str:
            text = value.encode()
            parts.append(b"s" + _LENGTH(len(text)) + text)
        elif value.__class__ is int:
            parts.append(b"i" + _INTEGER(value))
        elif value is None or value != value:
            return None
        else:
            raise FeatureStoreError(
                f"an entity key must be a string or a whole number, not {type(value).__name__}"
            )
    key = b"".join(parts)
    if len(key) > _LONGEST:
        return prefix + b"h" + hashlib.blake2b(key, digest_size=32).digest()
    return key


def encode_keys(prefix: bytes, columns: Sequence[NDArray[Any]]) -> Iterator[bytes | None]:
    """Return the bytes of each row's key; ``columns`` are the entity's key columns in order."""
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return (encode_key(prefix, row) for row in rows)
