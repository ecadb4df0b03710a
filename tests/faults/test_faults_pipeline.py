"""The pipeline's fault loops in their short form; by hand they kill fifty times."""

from __future__ import annotations

from pathlib import Path

from faults import kill_backfill, kill_push


def test_a_killed_backfill_leaves_no_row_out_and_none_twice(tmp_path: Path) -> None:
    assert kill_backfill.run(tmp_path, kills=3, rows=8_000).startswith("3 kills")


def test_a_killed_writer_loses_no_acknowledged_event(tmp_path: Path) -> None:
    assert kill_push.run(tmp_path, kills=3).startswith("3 kills")
