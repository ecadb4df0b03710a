"""Digests: how everything is addressed by its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mlops_ray.errors import ArtifactError

CHUNK_BYTES = 1 << 20
_THREADS = 8
_FOLDER = b"folder"
_LEAST_AGE_NS = 2_000_000_000
_ATOMS = (str, int, float, bool, type(None))


def new_digest() -> Any:
    """Return the state of a BLAKE2b-256 digest: ``update(bytes)``, ``hexdigest()``."""
    return hashlib.blake2b(digest_size=32)


def digest_bytes(data: bytes | memoryview) -> str:
    """Return the hexadecimal BLAKE2b-256 digest of ``data`` (64 characters)."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file's bytes, read in pieces.

    A file that this process has read before, and that has kept its inode, size and time of change,
    is not read again.
    """
    found = path.stat()
    if time.time_ns() - found.st_mtime_ns < _LEAST_AGE_NS:
        # A change within one tick of the file system's clock would not show in its time.
        return _read_digest(str(path))
    return _known_digest(str(path), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _known_digest(path: str, _inode: int, _size: int, _changed_ns: int) -> str:
    return _read_digest(path)


def _read_digest(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def digest_tree(path: Path) -> str:
    """Return the digest of a file, or of a folder's relative names and contents."""
    return digest_file(path) if path.is_file() else digest_files(file_digests(path))


def digest_files(files: Mapping[str, str]) -> str:
    """Return the digest of a folder: of its files' digests by relative name."""
    return digest_listing(canonical_json(files))


def digest_listing(listing: bytes) -> str:
    """Return the digest of a folder whose files' digests by name are this canonical JSON.

    It is not the digest of these bytes: a value that says the same is another thing.
    """
    return hashlib.blake2b(listing, digest_size=32, person=_FOLDER).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file below a folder by its relative name."""
    names = tree_files(folder)
    if len(names) < 2:
        return {name: digest_file(folder / name) for name in names}
    with ThreadPoolExecutor(min(_THREADS, len(names))) as pool:
        return dict(zip(names, pool.map(lambda n: digest_file(folder / n), names), strict=True))


def tree_files(folder: Path) -> list[str]:
    """Return the relative names of all files below a folder, sorted.

    Raises:
        ArtifactError: A link in it leads to a folder that it lies in.
    """
    found: list[str] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        for name in folders:
            _refuse_loop(parent, os.path.join(parent, name))
        found += (os.path.relpath(os.path.join(parent, name), folder) for name in names)
    return sorted(found)


def _refuse_loop(parent: str, folder: str) -> None:
    if os.path.islink(folder) and Path(parent).resolve().is_relative_to(Path(folder).resolve()):
        raise ArtifactError(
            "a folder cannot be stored: a link in it leads to a folder that it lies in",
            where=folder,
            fix="remove the link",
        )


def canonical_json(value: Any) -> bytes:
    """Write a JSON value in the one form that equal values share: sorted keys, no spaces.

    Pydantic models, dataclasses, named tuples, dates, durations, enumerations, paths, tuples and
    sets are accepted. NaN is kept.

    Raises:
        TypeError: There is something else in it.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":")).encode()


def digest_json(value: Any) -> str:
    """Return the digest of a value's canonical JSON."""
    return digest_bytes(canonical_json(value))


def _plain(value: Any) -> Any:
    if type(value) in _ATOMS:
        return value
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json", by_alias=True))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return _plain_atom(value)


def _plain_atom(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    return value
