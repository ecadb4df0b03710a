"""The database below the ledger: connections, transactions, what to try again, errors in words."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.migration import ensure_tables
from mlops_ray.metadata.operations import Request, forget_requests, perform
from mlops_ray.metadata.queries import QUERIES

PATIENCE_S = 30.0
"""How long to wait for a lock, or for a server that is away."""

_OPENING_PATIENCE_S = 5.0
_REQUESTS_BETWEEN_CLEANINGS = 1000
_LONGEST_PAUSE_S = 0.5
_TAKEN = "23505"
_LOST = frozenset({"40001", "40P01", "57P01", "57P02", "57P03", "25P03"})
"""SQLSTATEs of transactions that were rolled back through no fault of theirs."""

_REFUSED = ("authentication failed", "does not exist", "no pg_hba.conf entry", "permission denied")
"""What a server says, without a SQLSTATE, to those whom it does not let in."""

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
        parsed = sa.make_url(url)
        self._where = parsed.render_as_string(hide_password=True)
        self._is_server = parsed.get_backend_name() == "postgresql"
        patience = min(patience_s, _OPENING_PATIENCE_S) if self._is_server else patience_s
        try:
            self._engine = _engine(parsed, patience_s, create)
            self._writes = self._engine.execution_options(writes=True)
            self._patiently(lambda _again: ensure_tables(self._engine), patience)
        except (OSError, ImportError) as error:
            raise explained(error, self._where) from error

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
        others are done.
        """
        try:
            return self._perform(requests)
        except Exception as error:
            if len(requests) == 1:
                return [self._own(error)]
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

    def _perform(self, requests: Sequence[Request]) -> list[Any]:
        # SQLite lets one writer in; threads that wait here are let in sooner than by its polling.
        with self._writing, self._writes.begin() as connection:
            replies = [perform(connection, request) for request in requests]
            self._remembered += sum(1 for request in requests if request.id)
            if self._remembered >= _REQUESTS_BETWEEN_CLEANINGS:
                self._remembered = 0
                forget_requests(connection)
            return replies

    def _select(self, query: Any) -> list[dict[str, Any]]:
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
            except sa.exc.SQLAlchemyError as error:
                if not _is_lost(error) or time.monotonic() > deadline:
                    raise explained(error, self._where) from error
            again = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _own(self, error: Exception) -> Exception:
        known = isinstance(error, sa.exc.SQLAlchemyError | OSError)
        return explained(error, self._where) if known else error


def explained(error: Exception, where: str) -> LedgerError:
    """Say in words what the database refuses, and what to do about it."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    code = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or ""
    what, fix = _advice(code, cause)
    return LedgerError(what, where=where, why=lines[0], fix=fix)


_LOCKED_OUT = (
    "the ledger's database server does not let us in",
    "check user, password and database in MLOPS_RAY_LEDGER",
)
_ADVICE: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("SQLITE_BUSY", "SQLITE_LOCKED", "55P03"),
        "the ledger is locked by another process",
        "find who has the file open (fuser on it), end that process or wait for it, and run the "
        "same command again",
    ),
    (
        ("SQLITE_FULL", "SQLITE_IOERR", "53100", "58030"),
        "the ledger cannot be written to its disk",
        "free some space or check the disk, then run the same command again: what was written "
        "before is there",
    ),
    (
        ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "25006"),
        "the ledger cannot be opened for writing",
        "make its folder and file writable for this user, or set MLOPS_RAY_HOME to another folder",
    ),
    (
        ("SQLITE_CORRUPT", "SQLITE_NOTADB"),
        "the ledger's file is damaged, or is no ledger",
        "put a copy of it back, or save what is left with `sqlite3 ledger.db .recover`; to begin "
        "anew, set MLOPS_RAY_HOME to another folder",
    ),
    (("28", "3D000", "42501"), *_LOCKED_OUT),
)


def _advice(code: str, cause: Exception) -> tuple[str, str]:
    for codes, what, fix in _ADVICE:
        if code and code.startswith(codes):
            return what, fix
    if isinstance(cause, ImportError):
        return "the ledger's database needs a driver", "pip install 'mlops-ray[postgres]'"
    if isinstance(cause, OSError):
        return (
            "the ledger's folder cannot be used",
            "make it writable for this user, or set MLOPS_RAY_HOME to another folder",
        )
    if type(cause).__module__.startswith("psycopg") and not code:
        return (
            _LOCKED_OUT
            if _is_refused(cause)
            else (
                "the ledger's database server cannot be reached",
                "check that it runs and that MLOPS_RAY_LEDGER names it, then run the same command again",
            )
        )
    return "the ledger's database refuses", "see why; the rest of the ledger is unharmed"


def _is_lost(error: Exception) -> bool:
    """Say whether a server went away, or undid a transaction that can be tried again."""
    cause = getattr(error, "orig", None)
    if cause is None or not type(cause).__module__.startswith("psycopg"):
        return False
    code = getattr(cause, "sqlstate", None)
    if code == _TAKEN:
        # The same request, sent over a connection that broke, was being committed meanwhile.
        return "requests_pkey" in str(cause)
    if code is not None:
        return code in _LOST or code.startswith("08")
    is_operational = any(base.__name__ == "OperationalError" for base in type(cause).__mro__)
    return is_operational and not _is_refused(cause)


def _is_refused(cause: BaseException) -> bool:
    return any(text in str(cause) for text in _REFUSED)


def _engine(url: sa.URL, patience_s: float, create: bool) -> sa.Engine:
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, patience_s, create)
    milliseconds = int(patience_s * 1000)
    # A process that is stopped within a transaction must not hold its locks for ever.
    options = f"-c lock_timeout={milliseconds} -c idle_in_transaction_session_timeout=60000"
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        connect_args={"connect_timeout": 10, "options": options, "application_name": "mlops-ray"},
    )


def _sqlite_engine(url: sa.URL, patience_s: float, create: bool) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": patience_s})
    if url.database:
        path = Path(url.database)
        if not create and not path.is_file():
            raise FileNotFoundError(f"{path} is not on this machine")
        path.parent.mkdir(parents=True, exist_ok=True)
    sa.event.listen(engine, "connect", _configure_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads before it writes must have the write lock from the start: taking it
    # later fails at once, without waiting, where another process has written in between.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        _set_wal(cursor)
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _set_wal(cursor: Any) -> None:
    # Of processes that change the mode at once, all but one may be told at once that it is locked,
    # without the wait that other statements have.
    import sqlite3

    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
