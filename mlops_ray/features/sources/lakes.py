"""Tables of other systems: Delta Lake and Apache Iceberg, read at one version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from mlops_ray.errors import SourceError
from mlops_ray.features.sources.batches import Batches


def read_delta(
    path: str, filesystem: Any, place: str, options: Mapping[str, Any], where: str
) -> Batches:
    """Return the rows of a Delta table; ``options``: ``version``, the others go to its storage.

    Raises:
        SourceError: There is no such table or version, or it uses what cannot be read.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError
    from pyarrow.fs import SubTreeFileSystem

    from mlops_ray.features.sources.files import scan

    settings = {name: str(value) for name, value in options.items() if name != "version"}
    try:
        table = DeltaTable(path, version=options.get("version"), storage_options=settings or None)
        # deltalake's own filesystem can abort the interpreter at exit; Arrow's does not.
        dataset = table.to_pyarrow_dataset(filesystem=SubTreeFileSystem(place, filesystem))
    except (DeltaError, OSError) as error:
        raise SourceError(
            f"the Delta table at {path} cannot be read",
            where=f"{where}.path",
            why=str(error),
            fix="check the path and the version; tables with deletion vectors are not read",
        ) from error
    return scan(dataset, f"the Delta table at {path}", where)


def read_iceberg(name: str, options: Mapping[str, Any], where: str) -> Batches:
    """Return the rows of an Iceberg table.

    Args:
        name: ``namespace.table``.
        options: ``catalog``, its name (default ``default``); ``snapshot_id``; all others are the
            catalog's properties, as pyiceberg names them.
        where: How errors name the source.

    Raises:
        SourceError: pyiceberg is not installed, or the table cannot be read.
    """
    try:
        from pyiceberg.catalog import load_catalog
    except ImportError as error:
        raise SourceError(
            "Iceberg tables are read with pyiceberg, which is not installed",
            where=f"{where}.format",
            fix="pip install 'mlops-ray[iceberg]'",
        ) from error
    properties = {k: str(v) for k, v in options.items() if k not in ("catalog", "snapshot_id")}
    try:
        table = load_catalog(options.get("catalog", "default"), **properties).load_table(name)
        reader = table.scan(snapshot_id=options.get("snapshot_id")).to_arrow_batch_reader()
    except Exception as error:
        raise _unreadable(name, error, where) from error

    def flow() -> Iterator[pa.RecordBatch]:
        try:
            yield from reader
        except Exception as error:
            raise _unreadable(name, error, where) from error

    return Batches(reader.schema, flow())


def _unreadable(name: str, error: Exception, where: str) -> SourceError:
    return SourceError(
        f"the Iceberg table {name} cannot be read",
        where=f"{where}.path",
        why=f"{type(error).__name__}: {error}",
        fix="give namespace.table as path, and the catalog's properties as options",
    )
