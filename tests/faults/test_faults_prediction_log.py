"""The prediction log's fault loop in its short form; by hand it kills thirty times."""

from __future__ import annotations

from pathlib import Path

from faults import kill_replica_log


def test_a_killed_replica_loses_nothing_that_was_on_disk(tmp_path: Path) -> None:
    assert kill_replica_log.run(tmp_path, kills=3).startswith("3 kills")
