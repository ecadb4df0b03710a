"""The embedded online store: LMDB in a folder, for the processes of one machine."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.online.encoding import encode_keys
from mlops_ray.features.online.environment import environment_of
from mlops_ray.features.online.failures import Fallback, ServerGoneError
from mlops_ray.features.online.layout import (
    Layout,
    StoredView,
    is_left_over,
    stored_view,
    unknown_layout,
)
from mlops_ray.features.online.protocol import Cursor, Keys
from mlops_ray.features.online.reader import Reader, Values
from mlops_ray.features.online.rows import newest_rows, stored_times

_ROW, _CURSOR, _LAYOUT = b"v", b"c", b"l"
_NAME_AT, _DIGEST_BYTES = 3, 8


class _Thread(threading.local):
    """The transaction of a thread's batch: no other thread may write in it."""

    writing: Any = None


class LmdbStore:
    """An online store in one LMDB folder; see ``OnlineStore`` for what the methods promise.

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
        self._views = {name: stored_view(features, name) for name in features.views}
        self._environment = environment_of(path, readonly)
        self._online = features.online
        self._thread = _Thread()

    def write(self, view: str, rows: pa.Table) -> int:
        """Keep the newest row of each entity, stored ones included; return how many were written."""
        stored = self._view(view)
        written = 0
        with self._transaction() as transaction:
            _keep_layout(transaction, stored.layout)
            for values in newest_rows(stored, rows, _prefix(_ROW, stored)):
                written += _put_newest(transaction, values)
        return written

    def replace(self, view: str, tables: Iterable[pa.Table], cursor: Cursor) -> int:
        """Put these rows and this cursor in the place of all of the view, in one transaction."""
        if self._thread.writing is not None:
            raise FeatureStoreError("a view cannot be replaced inside a batch")
        stored = self._view(view)
        cursor = replace(cursor, filling=uuid.uuid4().hex)
        written = 0
        with self._transaction() as transaction:
            _delete(transaction, _prefix(_ROW, stored))
            _keep_layout(transaction, stored.layout)
            for rows in tables:
                for values in newest_rows(stored, rows, _prefix(_ROW, stored)):
                    written += _put_new(transaction, values)
            transaction.put(_prefix(_CURSOR, stored), json.dumps(asdict(cursor)).encode())
        return written

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make all writes inside one atomic transaction."""
        if self._thread.writing is not None:
            yield
            return
        try:
            with self._environment_for_writing().begin(write=True) as transaction:
                self._thread.writing = transaction
                try:
                    yield
                finally:
                    self._thread.writing = None
        except lmdb.Error as error:
            raise FeatureStoreError(
                "the online store cannot be written to",
                where=str(self._path),
                why=str(error),
                fix="check the disk's free space",
            ) from error

    def cursor(self, view: str) -> Cursor | None:
        """Return up to where the view is filled, None if never."""
        key = _prefix(_CURSOR, self._view(view))
        if self._thread.writing is not None:
            value = self._thread.writing.get(key)
        else:
            with self._environment.lmdb.begin() as transaction:
                value = transaction.get(key)
        return None if value is None else Cursor(**json.loads(value))

    def move_cursor(self, view: str, cursor: Cursor) -> bool:
        """Say up to where the view is filled; return whether its rows are still of that filling."""
        with self._transaction() as transaction:
            stored = self.cursor(view) or Cursor()
            if stored.filling != cursor.filling:
                return False
            key = _prefix(_CURSOR, self._view(view))
            transaction.put(key, json.dumps(asdict(stored.joined(cursor))).encode())
        return True

    def reader(self, views: Sequence[str]) -> Reader:
        """Return a reader of several views, whose rows it sees in one consistent state.

        A folder that is removed is read on as it was, from memory. Where LMDB itself fails, the
        reader does what ``features.online.on_failure`` says; see ``Fallback``.
        """
        stored = [self._view(view) for view in views]
        prefixes = [_prefix(_ROW, view) for view in stored]
        environment = self._environment
        timeout_s = self._online.timeout.total_seconds()
        fallback = Fallback(self._online.on_failure, len(views), timeout_s)

        def get_all(encoded: list[list[bytes | None]]) -> list[Values]:
            try:
                with environment.lmdb.begin() as transaction:
                    get = transaction.get
                    return [[None if k is None else get(k) for k in keys] for keys in encoded]
            except lmdb.Error as error:
                raise ServerGoneError(
                    "the online store cannot be read", where=str(self._path), why=str(error)
                ) from error

        def fetch(keys: Sequence[Keys]) -> list[Values]:
            encoded = [encode_keys(p, columns) for p, columns in zip(prefixes, keys, strict=True)]
            return fallback.read(encoded, lambda: get_all(encoded))

        return Reader(stored, fetch, self._layout_of, fallback)

    def read_matrix(
        self, view: str, keys: Keys, at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Return the features of each key as of ``at_us`` and their statuses: ``Reader.read``."""
        return self.reader([view]).read([keys], at_us)

    def drop_undeclared(self) -> None:
        """Forget rows that are not declared, but for a view whose present definition has none."""
        filled = {name for name in self._views if self.cursor(name) is not None}
        with self._transaction() as transaction:
            for kind in (_ROW, _CURSOR):
                for prefix in list(_prefixes(transaction, kind)):
                    name, digest = prefix[_NAME_AT:-_DIGEST_BYTES], prefix[-_DIGEST_BYTES:]
                    if is_left_over(self._views, filled, name.decode(), digest):
                        _delete(transaction, prefix)

    def clear(self) -> None:
        """Forget everything, in place: readers that have the store open see it empty."""
        database = self._environment_for_writing().open_db()
        with self._transaction() as transaction:
            transaction.drop(database, delete=False)

    def flush(self) -> None:
        """Make all that was written survive a crash of the machine."""
        self._environment_for_writing().sync(True)

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with self.batch():
            yield self._thread.writing

    def _environment_for_writing(self) -> Any:
        if self._readonly:
            raise FeatureStoreError("this online store is open for reading", where=str(self._path))
        return self._environment.lmdb

    def _view(self, name: str) -> StoredView:
        if name not in self._views:
            raise FeatureStoreError(
                f"there is no feature view {name!r}", fix=f"known views: {', '.join(self._views)}"
            )
        return self._views[name]

    def _layout_of(self, view: StoredView, schema: bytes) -> Layout:
        with self._environment.lmdb.begin() as transaction:
            content = transaction.get(_LAYOUT + schema)
        if content is None:
            raise unknown_layout(view.name, str(self._path))
        return Layout.from_json(content)


def _prefix(kind: bytes, view: StoredView) -> bytes:
    name = view.name.encode()
    return kind + len(name).to_bytes(2, "big") + name + view.digest


def _prefixes(transaction: Any, kind: bytes) -> Iterator[bytes]:
    """Yield what the keys of each definition begin with, without going through all keys."""
    cursor = transaction.cursor()
    found = cursor.set_range(kind)
    while found and cursor.key().startswith(kind):
        key = cursor.key()
        length = int.from_bytes(key[len(kind) : _NAME_AT], "big")
        prefix = key[: _NAME_AT + length + _DIGEST_BYTES]
        yield prefix
        after = int.from_bytes(prefix, "big") + 1
        found = cursor.set_range(after.to_bytes(len(prefix), "big"))


def _keep_layout(transaction: Any, layout: Layout) -> None:
    transaction.put(_LAYOUT + layout.schema, layout.to_json(), overwrite=False)


def _put_newest(transaction: Any, values: dict[bytes, bytes]) -> int:
    """Put rows by key but for those of which a newer one is stored; return how many were put."""
    # Neighbouring keys lie on one page.
    keys = sorted(values)
    cursor = transaction.cursor()
    for key, stored in cursor.getmulti(keys):
        if stored_times(stored) > stored_times(values[key]):
            del values[key]
    cursor.putmulti([(key, values[key]) for key in keys if key in values])
    return len(values)


def _put_new(transaction: Any, values: dict[bytes, bytes]) -> int:
    """Put rows most of which are new, so that looking first would be in vain."""
    items = sorted(values.items())
    _, added = transaction.cursor().putmulti(items, overwrite=False)
    return len(items) if added == len(items) else _put_newest(transaction, values)


def _delete(transaction: Any, prefix: bytes) -> None:
    cursor = transaction.cursor()
    found = cursor.set_range(prefix)
    while found and cursor.key().startswith(prefix):
        found = cursor.delete()
