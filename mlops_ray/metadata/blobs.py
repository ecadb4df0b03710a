"""Blobs: bytes, files and folders by their digest. What a folder and a bucket have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from mlops_ray.errors import ArtifactError

GRACE = timedelta(days=1)
"""What was written, or used as it was, within this time is never collected."""

DIGEST = re.compile(r"[0-9a-f]{64}")
"""How blobs are named."""

OWNER = "ledger"
"""The file beside the blobs that holds a run of the ledger that the store belongs to."""


@dataclass(frozen=True)
class Blob:
    """One stored blob: its digest, its size in bytes, and when it was last written or used.

    For what is used, ``used_at`` may lie up to half of ``GRACE`` in the past.
    """

    digest: str
    size: int
    used_at: datetime


class Blobs(Protocol):
    """Blobs by digest: there whole or not at all, durable on return, equal content kept once.

    A blob is a file or a *tree*: a folder, whose digest is that of its files' names and digests.
    Methods raise ``OSError``; ``FileNotFoundError`` where a blob is missing.
    """

    @property
    def where(self) -> str:
        """The folder or the address, for people."""

    def staging(self) -> AbstractContextManager[Path]:
        """Give a folder for drafts; what is left in it at the end is removed."""

    def keep(self, digest: str, data: bytes) -> None:
        """Store bytes."""

    def keep_file(self, digest: str, draft: Path) -> None:
        """Store a file from a staging folder; the draft is used up."""

    def keep_tree(self, digest: str, draft: Path, files: Mapping[str, str]) -> None:
        """Store a folder from a staging folder, with its files' digests; the draft is used up."""

    def read(self, digest: str) -> bytes:
        """Return a file's bytes."""

    def fetch(self, digest: str) -> Path:
        """Return where a blob's file or folder lies on this machine, brought here if need be.

        Raises:
            ArtifactError: It does not have the digest; a folder leaves that to ``verify``.
        """

    def path(self, digest: str) -> Path:
        """Return where on this machine a blob is, or would be."""

    def verify(self, digest: str) -> bool:
        """Say whether a blob is there and has its digest; one that is counts as used now."""

    def verify_all(self, digests: Iterable[str]) -> bool:
        """Say whether ``verify`` holds for each of them."""

    def members(self, digest: str) -> list[str]:
        """Return the digests of the other blobs that a tree is kept in.

        Raises:
            ArtifactError: The list of them is corrupt.
        """

    def discard(self, digest: str) -> None:
        """Remove a blob; nothing happens when it is not there."""

    def blobs(self) -> Iterator[Blob]:
        """Return all blobs."""

    def collect(self, digest: str, before: datetime) -> bool:
        """Remove a blob unless it was written or used since ``before``; say whether it is gone."""

    def owner(self) -> str | None:
        """Return the run that the store is marked with: its ledger has it; None without a mark."""

    def mark(self, run_id: str) -> None:
        """Mark the store as that of the ledger that has this run."""

    def sweep(self, before: datetime) -> int:
        """Remove drafts older than ``before``, left by processes that died; return their bytes."""


def corrupt(digest: str, where: str) -> ArtifactError:
    """Return the error that says that a blob is not what its digest says."""
    return ArtifactError(
        "the artifact is corrupt: its bytes do not have its digest",
        digest=digest,
        where=where,
        fix="run the workflow again: it is found, removed and made anew",
    )
