"""Rows of a database, by any URL that SQLAlchemy knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from mlops_ray.config.features import Sql
from mlops_ray.errors import SourceError
from mlops_ray.features.sources.batches import Batches


def read_sql(sql: Sql, where: str) -> Batches:
    """Return the rows of a query, fetched ``batch_rows`` at a time through a server-side cursor.

    Raises:
        SourceError: The database cannot be reached, the query fails, or a column mixes types.
    """
    return Batches.from_first(_fetch(sql, where))


def _fetch(sql: Sql, where: str) -> Iterator[pa.Table]:
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError

    engine = None
    try:
        engine = create_engine(sql.url)
        streaming = {"stream_results": True, "yield_per": sql.batch_rows}
        with engine.connect().execution_options(**streaming) as connection:
            result = connection.execute(text(sql.query))
            names, empty = list(result.keys()), True
            for rows in result.partitions():
                yield _table(names, rows)
                empty = False
            if empty:
                yield _table(names, [])
    except (SQLAlchemyError, ImportError) as error:
        raise SourceError(
            "the query failed",
            where=f"{where}.sql",
            why=_reason(error, sql.url),
            fix="check the URL, that the database's driver is installed, and the query",
        ) from error
    except pa.ArrowException as error:
        raise SourceError(
            "a column of the query has values of several types",
            where=f"{where}.sql",
            why=str(error),
            fix="cast the column in the query",
        ) from error
    finally:
        if engine is not None:
            engine.dispose()


def _table(names: Sequence[str], rows: Sequence[Any]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return pa.table({name: pa.array(values) for name, values in zip(names, columns, strict=True)})


def _reason(error: Exception, url: str) -> str:
    """Return what went wrong, without the URL's password."""
    from sqlalchemy.engine import make_url

    try:
        password = make_url(url).password
    except Exception:
        password = None
    text = f"{type(error).__name__}: {error}"
    return text.replace(str(password), "***") if password else text
