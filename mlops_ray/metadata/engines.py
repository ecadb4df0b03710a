"""Connections to the ledger's database: how SQLite and PostgreSQL are set up."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.redaction import redacted

_WAL_PATIENCE_S = 30.0
_SERVER_OPTIONS = {
    "application_name": "mlops-ray",
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}


def parse_url(url: str) -> sa.URL:
    """Return the parts of a ledger's URL.

    Raises:
        LedgerError: It is none, or names a database of another kind.
    """
    fix = (
        "write postgresql+psycopg://user:password@host/database into MLOPS_RAY_LEDGER; escape what "
    )
    fix += "is special in a password: %40 for @"
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        why = redacted(str(error), url)
        raise LedgerError(
            "this is no URL of a ledger", where=redacted(url), why=why, fix=fix
        ) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise LedgerError("a ledger lies in SQLite or PostgreSQL", where=redacted(url), fix=fix)
    return parsed


def make_engine(url: sa.URL, patience_s: float) -> sa.Engine:
    """Return an engine that waits so long for locks; nothing is connected yet."""
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, patience_s)
    milliseconds = int(patience_s * 1000)
    # A process that is stopped within a transaction must not hold its locks for ever.
    options = f"-c lock_timeout={milliseconds} -c idle_in_transaction_session_timeout=60000"
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        pool_size=2,
        connect_args={"options": options, **_SERVER_OPTIONS},
    )


def _sqlite_engine(url: sa.URL, patience_s: float) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": patience_s})
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

    deadline = time.monotonic() + _WAL_PATIENCE_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
