"""The command line that runs a workflow of a project again, as it is configured now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_REPLACED = ("workflow=", "home=", "until=")


def run_command(directory: Path, home: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments, without a workflow; the caller appends ``workflow=NAME`` and ``until=``."""
    kept = [override for override in overrides if not override.lstrip("+").startswith(_REPLACED)]
    base = (sys.executable, "-m", "mlops_ray", "-C", str(directory), "run")
    return (*base, *kept, f"home={home}")
