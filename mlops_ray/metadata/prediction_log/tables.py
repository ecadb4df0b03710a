"""The Delta tables of the prediction log: opening them, and up to where they go.

A table has one app transaction, whose number names a file with the sequence number that each replica has
reached. The file is on disk before the rows and the number are committed together. What is known of
replicas that are gone goes with the next commit, so neither grows with all replicas that ever were.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlops_ray.errors import ServingError
from mlops_ray.metadata.files import write_whole
from mlops_ray.metadata.prediction_log.layout import Kind, replica_folder, table_folder

TRANSACTION = "mlops-ray-log"
"""The name of the tables' app transaction."""

_KEPT_S = 86_400.0
"""How long older positions stay: somebody may be reading an older version of the table."""


def open_table(folder: Path, kind: Kind) -> Any:
    """Return a Delta table of a project's log at its newest version, None where there is none."""
    from deltalake import DeltaTable
    from deltalake.exceptions import TableNotFoundError

    path = table_folder(folder, kind)
    try:
        return DeltaTable(str(path)) if path.is_dir() else None
    except TableNotFoundError:
        return None


def read_positions(folder: Path, kind: Kind, table: Any) -> dict[str, int]:
    """Return, by replica, the sequence number up to which its frames are in this version of a table.

    Raises:
        ServingError: What the table refers to is not there.
    """
    number = None if table is None else table.transaction_version(TRANSACTION)
    if number is None:
        return {}
    path = _path(folder, kind, number)
    try:
        positions: dict[str, int] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ServingError(
            f"it is not known up to where the table of {kind} goes",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            fix="restore this file from a backup; without it, rows would be counted twice",
        ) from error
    return positions


def write_positions(folder: Path, kind: Kind, table: Any, positions: Mapping[str, int]) -> int:
    """Keep what the next commit reaches, and of the rest what replicas that are there have reached.

    Return the number of the app transaction that says so; before it is committed, nothing does.
    """
    known = read_positions(folder, kind, table)
    alive = {name: at for name, at in known.items() if replica_folder(folder, name).is_dir()}
    # By the clock: two that commit at the same time must not write to the same file.
    number = max(time.time_ns(), (table.transaction_version(TRANSACTION) or 0) + 1)
    content = json.dumps(alive | dict(positions), separators=(",", ":")).encode()
    write_whole(_path(folder, kind, number), content)
    return number


def remove_old_positions(folder: Path, kind: Kind, table: Any) -> None:
    """Remove the files that no version of the table refers to which anybody still reads."""
    present = _path(folder, kind, table.transaction_version(TRANSACTION) or 0)
    for path in present.parent.glob(f"{kind}-*.json"):
        if path.name < present.name and time.time() - path.stat().st_mtime > _KEPT_S:
            path.unlink(missing_ok=True)


def _path(folder: Path, kind: Kind, number: int) -> Path:
    return table_folder(folder, kind).parent / "positions" / f"{kind}-{number:020d}.json"
