"""Functions of the project's that read or clean rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from mlops_ray.config.targets import load
from mlops_ray.errors import MlopsRayError, SourceError
from mlops_ray.features.sources.batches import Batches


def call(target: str, arguments: Mapping[str, Any], where: str, *positional: Any) -> pa.Table:
    """Return the table that a function makes, from Arrow or pandas.

    Raises:
        SourceError: The function failed or returned something else.
    """
    return call_function(load(target), target, arguments, where, *positional)


def call_function(
    function: Any, target: str, arguments: Mapping[str, Any], where: str, *positional: Any
) -> pa.Table:
    """Return what ``call`` does, for a function that is loaded already; ``target`` is its name."""
    result = _called(function, target, arguments, where, positional)
    table = _as_table(result)
    if table is None:
        raise _no_table(target, result, where)
    return table


def read_function(target: str, arguments: Mapping[str, Any], where: str) -> Batches:
    """Return the rows that a function reads: an Arrow table, a pandas frame or a Ray Dataset.

    A Ray Dataset streams: its blocks come in their order, and only a few are in memory.

    Raises:
        SourceError: The function failed or returned something else.
    """
    result = _called(load(target), target, arguments, where, ())
    if _is_of(result, "ray.data"):
        return _dataset(result, target, where)
    table = _as_table(result)
    if table is None:
        raise _no_table(target, result, where)
    return Batches.of(table)


def _dataset(dataset: Any, target: str, where: str) -> Batches:
    dataset.context.execution_options.preserve_order = True

    def flow() -> Iterator[pa.Table]:
        try:
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        except Exception as error:
            raise failed(target, error, where) from error

    schema = dataset.schema()
    if schema is None:
        raise SourceError(
            f"{target} returned an empty Dataset without a schema",
            where=where,
            fix="return a pyarrow.Table where there may be no rows",
        )
    try:
        return Batches.from_first(flow())
    except StopIteration:
        return Batches.of(
            pa.schema(list(zip(schema.names, schema.types, strict=True))).empty_table()
        )


def _called(
    function: Any, target: str, arguments: Mapping[str, Any], where: str, positional: Any
) -> Any:
    try:
        return function(*positional, **arguments)
    except MlopsRayError:
        raise
    except Exception as error:
        raise failed(target, error, where) from error


def _as_table(result: Any) -> pa.Table | None:
    if isinstance(result, pa.Table):
        return result
    if _is_of(result, "pandas"):
        return pa.Table.from_pandas(result, preserve_index=False).replace_schema_metadata()
    return None


def _is_of(value: Any, package: str) -> bool:
    """Say whether a value is of a package's class, without importing the package."""
    return f"{type(value).__module__}.".startswith(f"{package}.")


def _no_table(target: str, result: Any, where: str) -> SourceError:
    return SourceError(
        f"{target} returned {type(result).__name__}, not a pyarrow.Table",
        where=where,
        fix="return a pyarrow.Table or a pandas DataFrame, or from read also a Ray Dataset",
    )


def failed(target: str, error: Exception, where: str) -> SourceError:
    """Make the error for a function that raised one."""
    return SourceError(
        f"{target} failed",
        where=where,
        why=f"{type(error).__name__}: {error}",
        fix="call the function in a Python shell to see the whole error",
    )
