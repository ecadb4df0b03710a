"""Opening the ledger of a home."""

from __future__ import annotations

from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger


def open_ledger(home: Home) -> Ledger:
    """Open the ledger of a home: the one way to do so."""
    return Ledger(home.ledger_url)
