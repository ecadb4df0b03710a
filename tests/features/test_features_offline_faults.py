"""The short form of ``python -m faults.kill_offline``."""

from __future__ import annotations

from pathlib import Path

from faults import kill_offline


def test_killed_appends_and_compactions_lose_and_double_nothing(tmp_path: Path) -> None:
    assert kill_offline.run(tmp_path, kills=4).startswith("4 processes killed")
