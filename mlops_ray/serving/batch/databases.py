"""Batches into a table of a database: one transaction for each job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlops_ray.errors import ServingError
from mlops_ray.metadata.redaction import redacted
from mlops_ray.serving.batch.outputs import part_files

JOBS = "mlops_ray_batches"
"""The table that says which jobs are in the database."""

_INSERT_ROWS = 10_000


class SqlOutput:
    """A table of a database that SQLAlchemy knows. Its content is replaced, or added to.

    The transaction that writes the rows also writes the job into the table ``mlops_ray_batches``, so
    that it happens once.
    """

    kind = "parquet"
    headers = True
    epoch = 0

    def __init__(self, url: str, table: str, append: bool, folder: Path) -> None:
        self._url = url
        self._table = table
        self._append = append
        self.work = folder / "work"
        self.rejected = folder / f"{table}.rejected.parquet"

    def check(self, schema: pa.Schema) -> pa.Schema:
        """Return the types in which rows are to be written: their own.

        Raises:
            ServingError: The database cannot be reached or has no such types, or rows are to be added
                to a table that has other columns.
        """
        import sqlalchemy as sa

        _sql_columns(schema)
        with self._engine() as engine:
            self._jobs().create(engine, checkfirst=True)
            there = self._columns(sa.inspect(engine))
        if self._append and there is not None and there != set(schema.names):
            raise ServingError(
                "rows of other columns cannot be added to the table",
                where=self._table,
                why=f"it has {', '.join(sorted(there))}; the rows {', '.join(schema.names)}",
                fix="write another table, or replace this one",
            )
        return schema

    def holds(self, job: str) -> bool:
        """Say whether the job is in the database."""
        import sqlalchemy as sa

        with self._engine() as engine, engine.connect() as connection:
            jobs = self._jobs()
            found = connection.execute(sa.select(jobs.c.job).where(jobs.c.job == job))
            return found.one_or_none() is not None

    def commit(self, job: str, schema: pa.Schema, parts: Path) -> None:
        """Write all rows and the job, in one transaction.

        Raises:
            ServingError: The database refuses them.
        """
        import sqlalchemy as sa

        if self.holds(job):
            return
        table = sa.Table(self._table, sa.MetaData(), *_sql_columns(schema))
        with self._engine() as engine, engine.begin() as connection:
            # First of all: from here on SQLite's driver has a transaction open, around DDL too.
            jobs = self._jobs()
            if not self._append:
                connection.execute(jobs.delete().where(jobs.c.table == self._table))
            connection.execute(jobs.insert(), {"job": job, "table": self._table})
            there = self._columns(sa.inspect(connection))
            if not self._append and there == set(schema.names):
                connection.execute(table.delete())
            else:
                if not self._append:
                    table.drop(connection, checkfirst=True)
                table.create(connection, checkfirst=True)
            for part in part_files(parts):
                for batch in pq.ParquetFile(part).iter_batches(_INSERT_ROWS):
                    connection.execute(table.insert(), batch.to_pylist())

    def _columns(self, inspector: Any) -> set[str] | None:
        if not inspector.has_table(self._table):
            return None
        return {str(column["name"]) for column in inspector.get_columns(self._table)}

    def _jobs(self) -> Any:
        import sqlalchemy as sa

        return sa.Table(
            JOBS,
            sa.MetaData(),
            sa.Column("job", sa.String(64), primary_key=True),
            sa.Column("table", sa.Text()),
        )

    def _engine(self) -> Any:
        from contextlib import contextmanager

        return contextmanager(self._connected)()

    def _connected(self) -> Any:
        from sqlalchemy import create_engine
        from sqlalchemy.exc import SQLAlchemyError

        engine = None
        try:
            engine = create_engine(self._url)
            yield engine
        except (SQLAlchemyError, ImportError) as error:
            raise ServingError(
                "the database does not take the rows",
                where=self._table,
                why=redacted(str(error), self._url).partition("\n")[0],
                fix="check the URL, that the database's driver is installed, and the rights there",
            ) from error
        finally:
            if engine is not None:
                engine.dispose()


def _sql_columns(schema: pa.Schema) -> list[Any]:
    import sqlalchemy as sa

    return [sa.Column(field.name, _sql_type(field)) for field in schema]


def _sql_type(field: pa.Field) -> Any:
    import sqlalchemy as sa

    kinds: tuple[tuple[Callable[[pa.DataType], bool], Any], ...] = (
        (pa.types.is_boolean, sa.Boolean()),
        (pa.types.is_integer, sa.BigInteger()),
        (pa.types.is_floating, sa.Double()),
        (pa.types.is_decimal, sa.Numeric()),
        (pa.types.is_timestamp, sa.DateTime(timezone=True)),
        (pa.types.is_date, sa.Date()),
        (pa.types.is_string, sa.Text()),
        (pa.types.is_large_string, sa.Text()),
        (pa.types.is_binary, sa.LargeBinary()),
        (pa.types.is_null, sa.Text()),
    )
    for fits, kind in kinds:
        if fits(field.type):
            return kind
    raise ServingError(
        f"column {field.name!r} of type {field.type} cannot be written to a database",
        fix="leave it out of the input",
    )
