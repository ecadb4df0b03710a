"""Opening the ledger of a home."""

from __future__ import annotations

import sys

from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger


def open_ledger(home: Home) -> Ledger:
    """Open the ledger of a home: the one way to do so.

    A process that is connected to Ray reaches a SQLite ledger through the cluster's one writer; all
    others, and all that use PostgreSQL, open the database themselves.

    Raises:
        LedgerError: The ledger cannot be opened.
    """
    ray = sys.modules.get("ray")
    if ray is None or not home.ledger_url.startswith("sqlite") or not ray.is_initialized():
        return Ledger(home.ledger_url)
    from mlops_ray.metadata.writer import RemoteDatabase

    return Ledger(RemoteDatabase(home.ledger_url))


def dismiss_writer(home: Home) -> None:
    """End what the cluster keeps for the ledger of a home that nobody will open again."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        from mlops_ray.metadata.writer import dismiss

        dismiss(home.ledger_url)
