"""The database below the ledger: connections, transactions, what to try again, errors in words."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from mlops_ray.metadata.engines import make_engine, parse_url
from mlops_ray.metadata.migration import ensure_tables
from mlops_ray.metadata.operations import Request, forget_requests, perform
from mlops_ray.metadata.queries import QUERIES
from mlops_ray.metadata.refusals import explained, is_lost

PATIENCE_S = 30.0
"""How long to wait for a lock, or for a server that is away."""

_OPENING_PATIENCE_S = 5.0
_REQUESTS_BETWEEN_CLEANINGS = 1000
_LONGEST_PAUSE_S = 0.5
_MOST_OPENINGS = 5
_Result = TypeVar("_Result")


class Backend(Protocol):
    """What the ledger stands on: operations and queries by name."""

    def write(self, operation: str, *arguments: Any) -> Any:
        """Do an operation in one transaction; on return it is durable."""

    def read(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        """Return the rows of a query."""

    def close(self) -> None:
        """Close all connections."""


class Database:
    """SQLite (WAL mode, waits for other writers) or PostgreSQL at a SQLAlchemy URL.

    Args:
        url: For example ``sqlite:////home/me/project/.mlops-ray/ledger.db``.
        patience_s: How long to wait for a lock, or for a server that is away.
        create: False refuses a file that is not there, rather than beginning an empty ledger.

    Raises:
        LedgerError: It cannot be opened.
    """

    def __init__(self, url: str, *, patience_s: float = PATIENCE_S, create: bool = True) -> None:
        self._patience_s = patience_s
        self._writing = threading.Lock()
        self._remembered = 0
        parsed = parse_url(url)
        self._url = url
        self._is_server = parsed.get_backend_name() == "postgresql"
        self._create = create
        is_file = not self._is_server and parsed.database
        self._path = Path(parsed.database or "") if is_file else None
        self._file: tuple[int, int] | None = None
        try:
            self._engine = make_engine(parsed, patience_s)
        except ImportError as error:
            raise explained(error, self._url) from error
        self._writes = self._engine.execution_options(writes=True)
        patience = min(patience_s, _OPENING_PATIENCE_S) if self._is_server else patience_s
        self._patiently(lambda _again: self._open(), patience)

    def write(self, operation: str, *arguments: Any) -> Any:
        """Do an operation in one transaction; on return it is durable.

        A connection that is lost on the way is made anew, and the operation is done if it was not.

        Raises:
            LedgerError: The database refuses, or cannot be reached for too long.
        """
        identity = uuid.uuid4().hex if self._is_server else ""
        request = Request(operation, arguments, identity)
        return self._patiently(lambda again: self._perform([request._replace(again=again)])[0])

    def write_all(self, requests: Sequence[Request]) -> list[Any]:
        """Do operations in one transaction where possible; return their replies.

        Each is done whole or not at all. One that is refused has the error for its reply, and the
        others are done. Where the database is locked, full or away, that is the reply to all.
        """
        try:
            return self._perform(requests)
        except Exception as error:
            if len(requests) == 1 or isinstance(error, OSError | sa.exc.OperationalError):
                return [self._own(error) for _ in requests]
        return [self.write_all([request])[0] for request in requests]

    def read(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        """Return the rows of a query.

        Raises:
            LedgerError: The database refuses, or cannot be reached for too long.
        """
        return self._patiently(lambda _again: self._select(QUERIES[query](*arguments)))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _open(self) -> None:
        if self._path is not None:
            if not self._create and not self._path.is_file():
                raise FileNotFoundError(f"{self._path} is not on this machine")
            self._path.parent.mkdir(parents=True, exist_ok=True)
        ensure_tables(self._engine)
        self._file = self._identity()

    def _follow_file(self) -> None:
        """Open anew where the file was removed or replaced: what is written to one that has no name
        any more is lost.
        """
        if self._path is None or self._identity() == self._file:
            return
        with self._writing:
            if self._identity() != self._file:
                self._engine.dispose()
                self._open()

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path) if self._path is not None else None
        except FileNotFoundError:
            found = None
        return (found.st_dev, found.st_ino) if found is not None else None

    def _perform(self, requests: Sequence[Request]) -> list[Any]:
        for _ in range(_MOST_OPENINGS):
            self._follow_file()
            # SQLite lets one writer in; threads that wait here are let in sooner than by its polling.
            with self._writing:
                file = self._file
                with self._writes.begin() as connection:
                    replies = self._answer(connection, requests)
            # The file may have been removed while we wrote to it: that would be lost.
            if self._path is None or self._identity() == file:
                return replies
        raise FileNotFoundError(f"{self._path} is removed again and again")

    def _answer(self, connection: sa.Connection, requests: Sequence[Request]) -> list[Any]:
        replies = [perform(connection, request) for request in requests]
        self._remembered += sum(1 for request in requests if request.id)
        if self._remembered >= _REQUESTS_BETWEEN_CLEANINGS:
            self._remembered = 0
            forget_requests(connection)
        return replies

    def _select(self, query: Any) -> list[dict[str, Any]]:
        self._follow_file()
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _patiently(
        self, work: Callable[[bool], _Result], patience_s: float | None = None
    ) -> _Result:
        deadline = time.monotonic() + (self._patience_s if patience_s is None else patience_s)
        pause, again = 0.02, False
        while True:
            try:
                return work(again)
            except OSError as error:
                raise explained(error, self._url) from error
            except sa.exc.SQLAlchemyError as error:
                if not is_lost(error) or time.monotonic() > deadline:
                    raise explained(error, self._url) from error
            again = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _own(self, error: Exception) -> Exception:
        known = isinstance(error, sa.exc.SQLAlchemyError | OSError)
        return explained(error, self._url) if known else error
