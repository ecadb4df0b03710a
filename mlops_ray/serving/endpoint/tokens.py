"""The file of bearer tokens: who may call an endpoint, for what, and how often.

A token is ``mr_<id>_<secret>``. The secret has 256 random bits, so a salted SHA-256 of it keeps it:
nobody can guess it from the digest. The file holds no token, only digests.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import AwareDatetime, Field, ValidationError

from mlops_ray.config.base import Frozen
from mlops_ray.errors import ServingError
from mlops_ray.metadata.files import sync

Scope = Literal["predict", "feedback", "explain", "metadata", "unlogged"]
"""What a token allows: the routes of these names, and ``unlogged``, to keep a request out of the log."""

SCOPES: tuple[Scope, ...] = get_args(Scope)
USUAL_SCOPES: tuple[Scope, ...] = tuple(scope for scope in SCOPES if scope != "unlogged")
"""What a token allows unless more is said: monitoring sees all that its owner does."""

PREFIX = "mr_"

_ID_BYTES, _SECRET_BYTES, _SALT_BYTES = 4, 32, 16


class Token(Frozen):
    """What is kept of a token: ``rate`` requests a second, and ``burst`` at once, where limited."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    salt: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    made: AwareDatetime
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    burst: int | None = Field(default=None, ge=1)


class _Content(Frozen):
    tokens: tuple[Token, ...] = ()


def read(path: Path) -> tuple[Token, ...]:
    """Return the tokens of a file.

    Raises:
        ServingError: There is none, or it holds something else.
    """
    try:
        return _Content.model_validate_json(path.read_bytes()).tokens
    except FileNotFoundError:
        raise ServingError(
            "there is no file of tokens",
            where=str(path),
            fix="make one: mlops-ray tokens add NAME",
        ) from None
    except (OSError, ValidationError) as error:
        raise ServingError(
            "the file of tokens cannot be read", where=str(path), why=str(error)
        ) from error


def add(
    path: Path,
    name: str,
    scopes: tuple[Scope, ...] = USUAL_SCOPES,
    *,
    rate: float | None = None,
    burst: int | None = None,
) -> str:
    """Make a token and return it: this is the only time that it can be seen.

    Raises:
        ServingError: There is one of that name, or the file cannot be read.
    """
    identifier, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    salt = secrets.token_hex(_SALT_BYTES)
    token = Token(
        id=identifier,
        name=name,
        scopes=scopes,
        salt=salt,
        digest=digest(salt, secret.encode()).hex(),
        made=datetime.now(UTC),
        rate=rate,
        burst=burst,
    )
    with _alone(path):
        known = read(path) if path.exists() else ()
        if any(other.name == name for other in known):
            raise ServingError(
                f"there is a token named {name!r}",
                where=str(path),
                fix=f"take another name, or remove it first: mlops-ray tokens remove {name}",
            )
        _write(path, (*known, token))
    return f"{PREFIX}{identifier}_{secret}"


def remove(path: Path, name: str) -> None:
    """Take a token's rights away. ServingError where there is none of that name."""
    with _alone(path):
        known = read(path)
        left = tuple(token for token in known if token.name != name)
        if len(left) == len(known):
            raise ServingError(
                f"there is no token named {name!r}",
                where=str(path),
                fix=f"known: {', '.join(token.name for token in known) or 'none'}",
            )
        _write(path, left)


def digest(salt: str, secret: bytes) -> bytes:
    """Return what is kept of a secret."""
    return hashlib.sha256(salt.encode() + secret).digest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, tokens: tuple[Token, ...]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    content = _Content(tokens=tokens).model_dump_json(indent=2).encode()
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content + b"\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync(path.parent)
