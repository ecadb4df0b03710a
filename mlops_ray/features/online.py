"""The online store: the newest feature row of every entity, in LMDB, read within microseconds."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import lmdb
import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.keys import encode_keys
from mlops_ray.features.layout import FLOAT, HEAD, WORD, Layout, layout_of, pack, stored_times

PRESENT, NULL, NOT_FOUND, EXPIRED = 0, 1, 2, 3

_MAP_BYTES = 16 * 2**30
_MOST_READERS = 512

Keys = Sequence[NDArray[Any]]


class Reader(Protocol):
    """Reads a fixed list of views; their features lie side by side in the result."""

    def read(
        self, keys: Sequence[Keys], at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Return features [n, f] as of ``at_us`` and the status of each; ``keys`` by view."""

    def read_values(self, keys: Sequence[Keys], at_us: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the features alone: quicker."""


class OnlineStore(Protocol):
    """What the pipeline writes and serving reads."""

    def write(
        self,
        view: str,
        keys: Keys,
        event_us: NDArray[np.int64],
        created_us: NDArray[np.int64],
        values: NDArray[np.float64],
        null: NDArray[np.bool_] | None = None,
    ) -> int:
        """Keep each row that is newer than the stored one; return how many were kept."""

    def read_matrix(
        self, view: str, keys: Keys, at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Return features [n, f] as of ``at_us`` and the status of each."""

    def reader(self, views: Sequence[str]) -> Reader:
        """Return a reader of several views at once."""

    def watermark(self, view: str) -> int | None:
        """Return up to which created time (µs) the view is written, None if never."""

    def move_watermark(self, view: str, watermark_us: int) -> None:
        """Say that the view is written up to there. It never moves back."""

    def batch(self) -> AbstractContextManager[None]:
        """Make all writes inside one atomic transaction."""

    def clear(self) -> None:
        """Forget everything."""

    def flush(self) -> None:
        """Make all that was written survive a crash of the machine."""


class LmdbStore:
    """An online store in one LMDB folder.

    Any number of processes may read while one writes; writers take turns. A write is atomic and
    seen by the next read. A killed process loses nothing; what came after the last ``flush`` may be
    lost with the machine, and the pipeline then fills the store again from the offline store.

    Args:
        path: The folder; made when the store is opened for writing.
        features: The declarations of the views.
        readonly: Open for reading only, as serving does.
    """

    def __init__(self, path: Path, features: Features, *, readonly: bool = False) -> None:
        self._path = path
        self._readonly = readonly
        self._layouts = {name: layout_of(features, name) for name in features.views}
        self._env = _environment(path, readonly)
        self._writing: Any = None

    def write(
        self,
        view: str,
        keys: Keys,
        event_us: NDArray[np.int64],
        created_us: NDArray[np.int64],
        values: NDArray[np.float64],
        null: NDArray[np.bool_] | None = None,
    ) -> int:
        """Keep each row that is newer than the stored one; return how many were kept.

        Newer is by (event time, created time), so the order of writing does not matter; an equal row
        replaces the stored one. Rows whose key has a null are skipped.

        Args:
            view: The view's name.
            keys: The entity's key columns, in order, each [n].
            event_us: int64 [n], µs since 1970.
            created_us: int64 [n], µs since 1970.
            values: float64 [n, f] in the view's feature order.
            null: bool [n, f], which of them are null; none when left out.
        """
        layout = self._layout(view)
        size = layout.words * WORD.itemsize
        packed = pack(layout, event_us, created_us, values, null)
        times = zip(event_us.tolist(), created_us.tolist(), strict=True)
        kept = 0
        with self._transaction() as transaction:
            for row, (key, time) in enumerate(
                zip(encode_keys(layout.prefix, keys), times, strict=True)
            ):
                if key is None:
                    continue
                stored = transaction.get(key)
                if (
                    stored is not None
                    and stored[:8] == layout.schema
                    and stored_times(stored) > time
                ):
                    continue
                transaction.put(key, packed[row * size : (row + 1) * size])
                kept += 1
        return kept

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make all writes inside one atomic transaction."""
        if self._writing is not None:
            yield
            return
        with self._environment_for_writing().begin(write=True) as transaction:
            self._writing = transaction
            try:
                yield
            finally:
                self._writing = None

    def read_matrix(
        self, view: str, keys: Keys, at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Return the features of each key as of ``at_us``, float64 [n, f], and uint8 statuses [n, f].

        PRESENT: the value. NULL: the newest row has a null there. EXPIRED: the newest row is older
        than the view's TTL at that moment. NOT_FOUND: there is no row; or the newest one lies after
        that moment, by event time or created time (the store keeps no older one); or a key is null.
        All but PRESENT are NaN in the matrix.
        """
        return self.reader([view]).read([keys], at_us)

    def reader(self, views: Sequence[str]) -> LmdbReader:
        """Return a reader of several views, whose rows it sees in one consistent state."""
        return LmdbReader(self._env, [self._layout(view) for view in views])

    def watermark(self, view: str) -> int | None:
        """Return up to which created time (µs) the view is written, None if never."""
        with self._env.lmdb.begin() as transaction:
            value = transaction.get(self._watermark_key(view))
        return None if value is None else int.from_bytes(value, "little", signed=True)

    def move_watermark(self, view: str, watermark_us: int) -> None:
        """Say that the view is written up to there. It never moves back."""
        key = self._watermark_key(view)
        with self._transaction() as transaction:
            value = transaction.get(key)
            if value is None or int.from_bytes(value, "little", signed=True) < watermark_us:
                transaction.put(key, watermark_us.to_bytes(8, "little", signed=True))

    def clear(self) -> None:
        """Forget everything, in place: readers that have the store open see it empty."""
        environment = self._environment_for_writing()
        database = environment.open_db()
        with environment.begin(write=True) as transaction:
            transaction.drop(database, delete=False)

    def flush(self) -> None:
        """Make all that was written survive a crash of the machine."""
        self._environment_for_writing().sync(True)

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self.batch():
            yield self._writing

    def _environment_for_writing(self) -> Any:
        if self._readonly:
            raise FeatureStoreError("this online store is open for reading", where=str(self._path))
        return self._env.lmdb

    def _layout(self, view: str) -> Layout:
        if view not in self._layouts:
            raise FeatureStoreError(
                f"there is no feature view {view!r}", fix=f"known views: {', '.join(self._layouts)}"
            )
        return self._layouts[view]

    def _watermark_key(self, view: str) -> bytes:
        layout = self._layout(view)
        return b"w" + layout.prefix + layout.schema


class LmdbReader:
    """Reads a fixed list of views; see ``LmdbStore.read_matrix`` for what the statuses mean.

    A request is a few rows, so time goes by the number of numpy calls: there are as many for ten
    views as for one.
    """

    def __init__(self, environment: _Environment, layouts: Sequence[Layout]) -> None:
        self._environment = environment
        self._views = [(layout.prefix, layout.schema, layout.blank) for layout in layouts]
        sizes = [layout.words for layout in layouts]
        starts = np.cumsum([0, *sizes])
        self._words = int(starts[-1])
        self._event = starts[:-1] + 1
        self._created = starts[:-1] + 2
        heads = starts[:-1] + HEAD
        null_words = np.array([layout.null_words for layout in layouts])
        first_bits = 64 * (np.cumsum(null_words) - null_words)
        counts = [layout.features for layout in layouts]
        self._nulls = _ranges(heads, null_words)
        self._values = _ranges(heads + null_words, counts)
        self._bits = _ranges(first_bits, counts)
        self._owner = np.repeat(np.arange(len(layouts)), counts)
        self._ttl_us = np.array([layout.ttl_us for layout in layouts])

    def read_values(self, keys: Sequence[Keys], at_us: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the features [n, f] of all views as of ``at_us``; NaN but where PRESENT."""
        words = self._fetch(keys)
        old, after = self._judge(words, at_us)
        unusable = old | after
        matrix = words.view(FLOAT).take(self._values, 1)
        if unusable.any():
            matrix[unusable[:, self._owner]] = np.nan
        return matrix

    def read(
        self, keys: Sequence[Keys], at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Return the features [n, f] of all views as of ``at_us``, and the status of each."""
        words = self._fetch(keys)
        old, after = self._judge(words, at_us)
        matrix = words.view(FLOAT).take(self._values, 1)
        packed = words.take(self._nulls, 1).view(np.uint8)
        null = np.unpackbits(packed, axis=1, bitorder="little").take(self._bits, 1)
        status = np.where(null == 1, NULL, PRESENT).astype(np.uint8)
        status[old[:, self._owner]] = EXPIRED
        status[after[:, self._owner]] = NOT_FOUND
        matrix[status > NULL] = np.nan
        return matrix, status

    def _fetch(self, keys: Sequence[Keys]) -> NDArray[np.int64]:
        found = []
        with self._environment.lmdb.begin() as transaction:
            get = transaction.get
            for (prefix, schema, blank), columns in zip(self._views, keys, strict=True):
                values = [b"" if key is None else get(key) for key in encode_keys(prefix, columns)]
                found.append([v if v is not None and v[:8] == schema else blank for v in values])
        joined = b"".join(
            found[0] if len(found) == 1 else chain.from_iterable(zip(*found, strict=True))
        )
        return np.frombuffer(joined, WORD).reshape(-1, self._words)

    def _judge(
        self, words: NDArray[np.int64], at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which rows [n, views] are too old, and which lie after their moment."""
        at = at_us[:, None]
        event = words.take(self._event, 1)
        after = np.maximum(event, words.take(self._created, 1)) > at
        # A missing row's event time is the largest number there is; its age would overflow.
        return (at - event > self._ttl_us) & ~after, after


def _ranges(starts: Iterable[int], lengths: Iterable[int]) -> NDArray[np.int64]:
    """Return all of start, start + 1, … for each start and its length."""
    parts = [np.arange(s, s + n, dtype=np.int64) for s, n in zip(starts, lengths, strict=True)]
    return np.concatenate(parts)


class _Environment:
    """The LMDB environment of one folder in one process; it becomes writable when asked to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writable = False
        self._file: tuple[int, int] | None = None
        self.lmdb: Any = None

    def open(self, readonly: bool) -> None:
        """Open it, or open it anew where the folder was removed and made again."""
        current = self.lmdb is not None and self._file == _file_identity(self._path)
        if current and (readonly or self._writable):
            return
        if self.lmdb is not None:
            self.lmdb.close()
            self.lmdb = None
        self.lmdb = _open(self._path, readonly)
        self._file = _file_identity(self._path)
        self._writable = not readonly


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = (path / "data.mdb").stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


# LMDB forbids a process to open one folder twice, so its stores of one folder share an environment.
_environments: dict[tuple[str, int], _Environment] = {}
_opening = threading.Lock()


def _environment(path: Path, readonly: bool) -> _Environment:
    identity = (str(path.absolute()), os.getpid())
    with _opening:
        shared = _environments.setdefault(identity, _Environment(path))
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
    try:
        environment = lmdb.open(
            str(path),
            map_size=_MAP_BYTES,
            readonly=readonly,
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
