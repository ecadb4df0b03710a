"""Values that must not be kept, as keyed digests: equal values stay equal, and nobody reads them."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.errors import ServingError
from mlops_ray.metadata.files import sync
from mlops_ray.metadata.prediction_log.layout import REDACTED

_KEY_BYTES = 32
_DIGEST_BYTES = 16


class Redaction:
    """Replaces the values of named columns by BLAKE2b digests (RFC 7693) under a key of the home.

    The same value of the same column has the same digest in all replicas. A null stays a null.

    Args:
        columns: Names of inputs or features.
        key: 32 bytes; see ``project_key``.
    """

    def __init__(self, columns: Iterable[str], key: bytes) -> None:
        self._columns = frozenset(columns)
        self._key = key

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def column(self, name: str, values: NDArray[Any]) -> pa.Array:
        """Return a column's digests as text."""
        return pa.array([self._digest(name, value) for value in values.tolist()], pa.string())

    def _digest(self, name: str, value: Any) -> str | None:
        if value is None or value != value:
            return None
        text = f"{name}\0{value}".encode()
        digest = hashlib.blake2b(text, key=self._key, digest_size=_DIGEST_BYTES)
        return REDACTED + digest.hexdigest()


def open_redaction(folder: Path, columns: Collection[str]) -> Redaction:
    """Return the redaction of a project's prediction log; it needs no key where nothing is redacted.

    Raises:
        ServingError: The key is damaged.
        OSError: It cannot be read or made.
    """
    return Redaction(columns, project_key(folder) if columns else b"")


def project_key(folder: Path) -> bytes:
    """Return the key of a project's prediction log, made when it is first asked for.

    It lies in the log's folder, readable by its owner alone. Without it nobody can tell what a digest
    stands for; where it is lost, new digests do not match those of before.

    Raises:
        ServingError: The key is damaged.
        OSError: It cannot be read or made.
    """
    path = folder / "redaction.key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".redaction.{secrets.token_hex(8)}"
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "wb") as stream:
            stream.write(secrets.token_bytes(_KEY_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        try:
            # Another replica may have been quicker: the first key stands.
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        sync(folder)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ServingError(
            "the key of the prediction log's redaction is damaged",
            where=str(path),
            why=f"it has {len(key)} bytes, not {_KEY_BYTES}",
            fix="restore it; without it, remove it: new digests then do not match those of before",
        )
    return key


def chosen(ids: list[str], share: float) -> NDArray[np.bool_]:
    """Return which ids belong to a sample, bool [n]: each with probability ``share``.

    It goes by a digest of the id alone, so that an id is always in or always out, and in a larger
    share with all those of a smaller one.
    """
    if share >= 1.0:
        return np.ones(len(ids), np.bool_)
    digests = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids]
    numbers = np.frombuffer(b"".join(digests), dtype="<u8")
    return np.asarray(numbers < np.uint64(min(int(share * 2.0**64), 2**64 - 1)), np.bool_)
