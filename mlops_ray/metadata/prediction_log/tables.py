"""The Delta tables of the prediction log: opening them, and up to where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlops_ray.metadata.prediction_log.layout import Kind, table_folder

_TRANSACTION = "mlops-ray-log-{replica}"


def open_table(folder: Path, kind: Kind) -> Any:
    """Return a Delta table of a project's log at its newest version, None where there is none."""
    from deltalake import DeltaTable
    from deltalake.exceptions import TableNotFoundError

    path = table_folder(folder, kind)
    try:
        return DeltaTable(str(path)) if path.is_dir() else None
    except TableNotFoundError:
        return None


def transaction_of(replica: str) -> str:
    """Return the name of the Delta app transaction that says up to where a replica's frames are in."""
    return _TRANSACTION.format(replica=replica)


def reached_by(table: Any, replica: str) -> int:
    """Return the sequence number up to which the frames of a replica are in a table."""
    version = table.transaction_version(transaction_of(replica)) if table is not None else None
    return 0 if version is None else int(version)
