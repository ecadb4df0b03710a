"""The LMDB environment of a folder, shared by all stores that a process opens there."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import lmdb

from mlops_ray.errors import FeatureStoreError

_MAP_BYTES = 64 * 2**30
_MOST_READERS = 512


class Environment:
    """The LMDB environment of one folder in one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self.lmdb: Any = None

    def open(self, readonly: bool) -> None:
        """Open it, or open it anew where the folder was removed and made again."""
        if self.lmdb is None or self._file != _file_identity(self._path):
            # The old one closes by itself, after the last read that is under way in it.
            self.lmdb = _open(self._path, readonly)
            self._file = _file_identity(self._path)


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = (path / "data.mdb").stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


# LMDB forbids a process to open one folder twice, so its stores of one folder share an environment.
_environments: dict[tuple[str, int], Environment] = {}
_opening = threading.Lock()


def environment_of(path: Path, readonly: bool) -> Environment:
    """Return the environment of a folder; ``readonly`` says that it has to be there already.

    Raises:
        FeatureStoreError: There is none to read, or it cannot be opened.
    """
    identity = (str(path.absolute()), os.getpid())
    with _opening:
        shared = _environments.setdefault(identity, Environment(path))
        shared.open(readonly)
        return shared


def _open(path: Path, readonly: bool) -> Any:
    if readonly and not (path / "data.mdb").exists():
        raise FeatureStoreError(
            "there is no online store yet",
            where=str(path),
            fix="run the features workflow first: it fills the store",
        )
    path.mkdir(parents=True, exist_ok=True)
    # It could not become writable later: that would end it under the process's readers.
    writable = not readonly or os.access(path / "data.mdb", os.W_OK)
    try:
        environment = lmdb.open(
            str(path),
            map_size=_MAP_BYTES,
            readonly=not writable,
            max_readers=_MOST_READERS,
            sync=False,
            metasync=False,
        )
        # A killed reader would keep old pages from being used again.
        environment.reader_check()
    except lmdb.Error as error:
        raise FeatureStoreError(
            "the online store cannot be opened",
            where=str(path),
            why=str(error),
            fix="check the folder's permissions and the disk's free space",
        ) from error
    return environment
