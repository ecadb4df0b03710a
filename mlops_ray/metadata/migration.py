"""Bringing a ledger's tables to the revision of this version of the code."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.schema import METADATA, REVISION

_FIRST = "0001"
_VERSIONS = sa.Table(
    "alembic_version", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True)
)
_LOCK = 0x6C6564676572


def ensure_tables(engine: sa.Engine) -> None:
    """Make the tables of an empty database, or upgrade those of an earlier version.

    Several processes may do so at once. Before a SQLite file is upgraded it is copied to
    ``ledger.db.before-<revision>``.

    Raises:
        LedgerError: The ledger was written by a later version.
    """
    with engine.connect() as connection:
        if revision_of(connection) == REVISION:
            return
    with engine.execution_options(writes=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        found = revision_of(connection)
        if found is None:
            METADATA.create_all(connection)
            _VERSIONS.create(connection)
            connection.execute(_VERSIONS.insert().values(version_num=REVISION))
        elif found < REVISION:
            _keep_copy(engine)
            upgrade(connection)
        elif found > REVISION:
            raise LedgerError(
                "the ledger was written by a later version of mlops-ray",
                where=engine.url.render_as_string(hide_password=True),
                why=f"its tables are of revision {found}; this version knows {REVISION}",
                fix="install the later version, or set MLOPS_RAY_HOME to another folder",
            )


def revision_of(connection: sa.Connection) -> str | None:
    """Return the revision of a database's tables; None where there are none."""
    tables = sa.inspect(connection)
    if tables.has_table(_VERSIONS.name):
        found = connection.execute(sa.select(_VERSIONS.c.version_num)).scalar_one_or_none()
        if found is not None:
            return str(found)
    # The first ledgers did not say which revision they are.
    return _FIRST if tables.has_table("runs") else None


def upgrade(connection: sa.Connection, target: str = "head") -> None:
    """Run the migrations that lead to ``target``, within the connection's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    if revision_of(connection) == _FIRST and not sa.inspect(connection).has_table(_VERSIONS.name):
        command.stamp(config, _FIRST)
    command.upgrade(config, target)


def _keep_copy(engine: sa.Engine) -> None:
    if engine.dialect.name != "sqlite" or not engine.url.database:
        return
    path = Path(engine.url.database)
    kept = path.with_name(f"{path.name}.before-{REVISION}")
    draft = kept.with_name(f".{kept.name}.{os.getpid()}.draft")
    source: Any = sqlite3.connect(path)
    copy: Any = sqlite3.connect(draft)
    try:
        source.backup(copy)
    finally:
        copy.close()
        source.close()
    os.replace(draft, kept)
