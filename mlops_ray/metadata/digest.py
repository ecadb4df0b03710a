"""Digests: how everything is addressed by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

_CHUNK_BYTES = 1 << 20


def digest_bytes(data: bytes) -> str:
    """Return the hexadecimal BLAKE2b-256 digest of ``data`` (64 characters)."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, read in pieces."""
    state = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def digest_tree(path: Path) -> str:
    """Return the digest of a file, or of a folder's relative names and contents."""
    if path.is_file():
        return digest_file(path)
    entries = {
        str(file.relative_to(path)): digest_file(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    return digest_json(entries)


def canonical_json(value: Any) -> bytes:
    """Write a JSON value in the one form that equal values share: sorted keys, no spaces.

    Pydantic models, dates, durations, enumerations, paths, tuples and sets are accepted. NaN is kept.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":")).encode()


def digest_json(value: Any) -> str:
    """Return the digest of a value's canonical JSON."""
    return digest_bytes(canonical_json(value))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json", by_alias=True))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        return value.item()
    return value
