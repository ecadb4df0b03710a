"""Blobs in a folder: two letters of the digest, then the digest; drafts beside them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from mlops_ray.metadata.blobs import DIGEST, OWNER, Blob
from mlops_ray.metadata.digest import digest_tree
from mlops_ray.metadata.files import sync, write_whole

_DRAFT = ".incoming-"
_SHELVES = tuple(f"{number:02x}" for number in range(256))
_TOUCH_EVERY_S = 3600.0
_UNSETTLED_S = 60.0


class FolderBlobs:
    """Blobs below one folder, which is made when the first one is written.

    Args:
        root: The folder.
        durable: Whether what is kept survives a crash of the machine. A cache need not.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self.root = root
        self._durable = durable

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.root)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Give a folder for drafts, on the same file system."""
        self._prepare()
        with tempfile.TemporaryDirectory(dir=self.root, prefix=_DRAFT) as folder:
            yield Path(folder)

    def keep(self, digest: str, data: bytes) -> None:
        """Store bytes: one write, two fsyncs; none where they have long been there."""
        if self._has(digest):
            return
        self._prepare()
        draft = self.root / f"{_DRAFT}{uuid.uuid4().hex}"
        try:
            handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            try:
                _write_all(handle, data)
                if self._durable:
                    os.fsync(handle)
            finally:
                os.close(handle)
            self._place(digest, draft)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def keep_file(self, digest: str, draft: Path) -> None:
        """Store a file that is durable already."""
        if not self._has(digest):
            self._place(digest, draft)

    def keep_tree(self, digest: str, draft: Path, files: Mapping[str, str]) -> None:
        """Store a folder whose files are durable already."""
        if self._has(digest):
            return
        if self._durable:
            for parent, _, _ in os.walk(draft):
                sync(Path(parent))
        self._place(digest, draft)

    def read(self, digest: str) -> bytes:
        """Return a file's bytes."""
        return self.path(digest).read_bytes()

    def fetch(self, digest: str) -> Path:
        """Return a blob's path."""
        path = self.path(digest)
        path.stat()
        return path

    def path(self, digest: str) -> Path:
        """Return where a blob is, or would be."""
        return self.root / digest[:2] / digest

    def verify(self, digest: str) -> bool:
        """Say whether a blob is there and has its digest."""
        path = self.path(digest)
        try:
            if time.time() - path.stat().st_mtime > _TOUCH_EVERY_S:
                # Before the look, so that what is found intact is not collected meanwhile.
                _touch(path)
            return digest_tree(path) == digest
        except (FileNotFoundError, NotADirectoryError):
            return False

    def verify_all(self, digests: Iterable[str]) -> bool:
        """Say whether all are there and have their digests."""
        return all(self.verify(digest) for digest in digests)

    def members(self, digest: str) -> list[str]:
        """Return nothing: a tree is one folder."""
        return []

    def discard(self, digest: str) -> None:
        """Remove a blob: whoever looks for it sees it whole or not at all."""
        with suppress(FileNotFoundError):
            _remove(self._set_aside(digest))

    def blobs(self) -> Iterator[Blob]:
        """Return all blobs, in no order."""
        for shelf in _SHELVES:
            with suppress(FileNotFoundError), os.scandir(self.root / shelf) as entries:
                for entry in entries:
                    if not DIGEST.fullmatch(entry.name):
                        continue
                    # Another process may remove one meanwhile.
                    with suppress(FileNotFoundError):
                        used_at = datetime.fromtimestamp(entry.stat().st_mtime, UTC)
                        yield Blob(entry.name, _size(Path(entry.path)), used_at)

    def collect(self, digest: str, before: datetime) -> bool:
        """Remove a blob that was not used since ``before``, also if it is used at this moment."""
        try:
            if not _older(self.path(digest), before):
                return False
            aside = self._set_aside(digest)
        except FileNotFoundError:
            return True
        if _older(aside, before):
            _remove(aside)
            return True
        # Somebody has begun to use it in between. They may have written it anew as well.
        with suppress(OSError):
            aside.rename(self.path(digest))
        if aside.exists():
            _remove(aside)
        return False

    def sweep(self, before: datetime) -> int:
        """Remove drafts that nobody finished."""
        if not self.root.is_dir():
            return 0
        removed = 0
        for draft in list(self.root.glob(f"{_DRAFT}*")):
            with suppress(FileNotFoundError):
                if _older(draft, before):
                    size = _size(draft)
                    _remove(draft)
                    removed += size
        return removed

    def owner(self) -> str | None:
        """Return the run that the store is marked with."""
        try:
            return (self.root / OWNER).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def mark(self, run_id: str) -> None:
        """Mark the store as that of the ledger that has this run."""
        write_whole(self.root / OWNER, run_id.encode())

    def _has(self, digest: str) -> bool:
        """Say whether a blob is there, intact, and durable."""
        if not self.verify(digest):
            return False
        path = self.path(digest)
        with suppress(FileNotFoundError):
            if self._durable and time.time() - path.stat().st_ctime < _UNSETTLED_S:
                # Who has just put it there may not have synced its folder yet.
                sync(path.parent)
        return True

    def _prepare(self) -> None:
        if (self.root / _SHELVES[-1]).is_dir():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        for shelf in _SHELVES:
            (self.root / shelf).mkdir(exist_ok=True)
        if self._durable:
            sync(self.root)
            sync(self.root.parent)

    def _place(self, digest: str, draft: Path) -> None:
        target = self.path(digest)
        try:
            draft.rename(target)
        except OSError:
            if self.verify(digest):
                return
            # A corrupt tree, which nothing can be renamed onto.
            self.discard(digest)
            draft.rename(target)
        if self._durable:
            sync(target.parent)

    def _set_aside(self, digest: str) -> Path:
        aside = self.root / f"{_DRAFT}{uuid.uuid4().hex}"
        self.path(digest).rename(aside)
        return aside


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except FileNotFoundError:
        raise
    except OSError:
        # A store that cannot be written can still be read.
        return


def _older(path: Path, moment: datetime) -> bool:
    return path.stat().st_mtime < moment.timestamp()


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
