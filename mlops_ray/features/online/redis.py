"""The online store of a cluster: a Redis server that all nodes reach."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.online import scripts
from mlops_ray.features.online.connection import Command, RedisServer
from mlops_ray.features.online.encoding import encode_keys
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
from mlops_ray.features.online.rows import newest_rows

_CALL_ROWS = 1000


class _Thread(threading.local):
    """A thread's batch: its commands, and the cursors that they move, as the server keeps them."""

    def __init__(self) -> None:
        self.batch: list[Command] | None = None
        self.moved: dict[str, bytes] = {}


class RedisStore:
    """An online store in a Redis server; see ``OnlineStore`` for what the methods promise.

    Any number of processes on any machine may read and write. Each thousand rows of a write are
    compared and put by one script, so a written row is whole and never older than what was there.
    What the server acknowledged is as durable as its persistence makes it (``appendfsync always``
    loses nothing). Give it ``maxmemory-policy noeviction``: a store is no cache.

    Nothing is asked of the server before the first read or write, and after it was gone the next
    call connects again.

    Args:
        features: The declarations of the views; ``features.online`` says where the server is.
        project: What all keys begin with.
        readonly: Open for reading only, as serving does.
    """

    def __init__(self, features: Features, project: str, *, readonly: bool = False) -> None:
        self._server = RedisServer(features.online.url, features.online.timeout.total_seconds())
        self._timeout_s = features.online.timeout.total_seconds()
        self._on_failure = features.online.on_failure
        self._readonly = readonly
        self._project = project
        self._views = {name: stored_view(features, name) for name in features.views}
        self._fillings, self._layouts, self._known, self._cursors = (
            f"{project}:{name}".encode() for name in ("fillings", "layouts", "views", "cursors")
        )
        self._thread = _Thread()

    def write(self, view: str, rows: pa.Table) -> int:
        """Keep the newest row of each entity, stored ones included; return how many were written.

        Inside a batch: how many rows the server will decide about.
        """
        self._check_writable()
        stored = self._view(view)
        keys = self._rows_key(stored), self._fillings, self._layouts, self._known
        head = stored.layout.schema, stored.layout.to_json()
        calls = (
            _call(scripts.WRITE, keys, (*head, *chain.from_iterable(values.items())))
            for values in newest_rows(stored, rows, most=_CALL_ROWS)
        )
        if self._thread.batch is None:
            return sum(self._server.stream(calls))
        commands = list(calls)
        self._thread.batch += commands
        return sum((len(command) - 3 - len(keys) - len(head)) // 2 for command in commands)

    def replace(self, view: str, tables: Iterable[pa.Table], cursor: Cursor) -> int:
        """Fill these rows into a hash of their own, then put it in the place of the view's rows.

        Raises:
            FeatureStoreError: Another process began to do the same; its rows will stand.
        """
        self._check_writable()
        if self._thread.batch is not None:
            raise FeatureStoreError("a view cannot be replaced inside a batch")
        stored = self._view(view)
        filling = uuid.uuid4().hex
        token = filling.encode()
        keys = self._rows_key(stored), self._fillings
        head = stored.layout.schema, stored.layout.to_json(), token
        self._server.call(_call(scripts.BEGIN, (*keys, self._layouts, self._known), head))
        calls = (
            _call(scripts.FILL, keys, (token, *chain.from_iterable(values.items())))
            for rows in tables
            for values in newest_rows(stored, rows, most=_CALL_ROWS)
        )
        written = 0
        for count in self._server.stream(calls):
            self._check_mine(view, count)
            written += count
        content = _cursor_bytes(replace(cursor, filling=filling))
        end = _call(scripts.FINISH, (*keys, self._cursors), (token, content))
        self._check_mine(view, self._server.call(end))
        return written

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Send all writes inside as one transaction at the end."""
        self._check_writable()
        thread = self._thread
        if thread.batch is not None:
            yield
            return
        thread.batch = []
        try:
            yield
            if thread.batch:
                self._server.transaction(thread.batch)
        finally:
            thread.batch = None
            thread.moved.clear()

    def cursor(self, view: str) -> Cursor | None:
        """Return up to where the view is filled, None if never."""
        content = self._cursor_content(view)
        return _cursor_of(content) if content else None

    def move_cursor(self, view: str, cursor: Cursor) -> bool:
        """Say up to where the view is filled; return whether its rows are still of that filling.

        Inside a batch the server decides at the end. There it also stays where another process moved
        it meanwhile.
        """
        self._check_writable()
        keys = self._rows_key(self._view(view)), self._cursors
        while True:
            before = self._cursor_content(view)
            stored = _cursor_of(before) if before else Cursor()
            if stored.filling != cursor.filling:
                return False
            moved = _cursor_bytes(stored.joined(cursor))
            command = _call(scripts.MOVE, keys, (before, moved))
            if self._thread.batch is not None:
                self._thread.batch.append(command)
                self._thread.moved[view] = moved
                return True
            if self._server.call(command):
                return True

    def reader(self, views: Sequence[str]) -> Reader:
        """Return a reader of several views, whose rows it sees in one consistent state.

        It reads all of them in one round trip. Where the server does not answer, it does what
        ``features.online.on_failure`` says (see ``Fallback``), and for as long as a timeout takes the
        server is not asked again.
        """
        stored = [self._view(view) for view in views]
        names = [self._rows_key(view) for view in stored]
        fallback = Fallback(self._on_failure, len(views), self._timeout_s)

        def fetch(keys: Sequence[Keys]) -> list[Values]:
            encoded = [encode_keys(b"", columns) for columns in keys]
            return fallback.read(encoded, lambda: self._get(names, encoded))

        def layout_of(view: StoredView, schema: bytes) -> Layout | None:
            try:
                return self._layout_of(view, schema)
            except ServerGoneError as error:
                fallback.miss(error)
                return None

        return Reader(stored, fetch, layout_of, fallback)

    def read_matrix(
        self, view: str, keys: Keys, at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Return the features of each key as of ``at_us`` and their statuses: ``Reader.read``."""
        return self.reader([view]).read([keys], at_us)

    def drop_undeclared(self) -> None:
        """Forget rows that are not declared, but for a view whose present definition has none."""
        self._check_writable()
        filled = {name for name in self._views if self.cursor(name) is not None}
        known = self._server.call((b"SMEMBERS", self._known))
        for key in {*known, *self._server.call((b"HKEYS", self._cursors))}:
            name, digest = key.decode().removeprefix(f"{self._project}:").rsplit(":", 1)
            if is_left_over(self._views, filled, name, bytes.fromhex(digest)):
                keys = key, self._fillings, self._known, self._cursors
                self._server.call(_call(scripts.DROP, keys, ()))

    def clear(self) -> None:
        """Forget everything of the project: readers see it empty."""
        self._check_writable()
        keys = self._fillings, self._layouts, self._known, self._cursors
        self._server.call(_call(scripts.CLEAR, keys, ()))

    def flush(self) -> None:
        """Nothing is held back here: how durable a write is, the server's persistence decides."""

    def _get(self, names: list[bytes], encoded: list[list[bytes | None]]) -> list[Values]:
        # An empty field stands for a key with a null: there is no such field.
        commands: list[Command] = [
            (b"HMGET", name, *[key or b"" for key in keys])
            for name, keys in zip(names, encoded, strict=True)
            if keys
        ]
        if not commands:
            return [[] for _ in names]
        if len(commands) == 1:
            return [self._server.call(commands[0])]
        return self._server.transaction(commands)

    def _cursor_content(self, view: str) -> bytes:
        """Return the cursor as the server keeps it, empty where there is none."""
        key = self._rows_key(self._view(view))
        moved = self._thread.moved.get(view)
        return moved or self._server.call((b"HGET", self._cursors, key)) or b""

    def _check_writable(self) -> None:
        if self._readonly:
            raise FeatureStoreError(
                "this online store is open for reading", where=self._server.address
            )

    def _check_mine(self, view: str, answer: int) -> None:
        if answer < 0:
            raise FeatureStoreError(
                f"another process fills view {view!r} anew",
                where=self._server.address,
                fix="wait for its end, then run it again",
            )

    def _view(self, name: str) -> StoredView:
        if name not in self._views:
            raise FeatureStoreError(
                f"there is no feature view {name!r}", fix=f"known views: {', '.join(self._views)}"
            )
        return self._views[name]

    def _rows_key(self, view: StoredView) -> bytes:
        return f"{self._project}:{view.name}:{view.digest.hex()}".encode()

    def _layout_of(self, view: StoredView, schema: bytes) -> Layout:
        content = self._server.call((b"HGET", self._layouts, schema))
        if content is None:
            raise unknown_layout(view.name, self._server.address)
        return Layout.from_json(content)


def _cursor_bytes(cursor: Cursor) -> bytes:
    return json.dumps(asdict(cursor)).encode()


def _cursor_of(content: bytes) -> Cursor:
    return Cursor(**json.loads(content))


def _call(script: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Command:
    return (b"EVAL", script, len(keys), *keys, *arguments)
