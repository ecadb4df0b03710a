"""The fault loop of batch scoring in its short form; by hand it kills twenty times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faults import kill_batch


def test_a_killed_batch_loses_no_row_and_repeats_none(ray_cluster: Any, tmp_path: Path) -> None:
    assert " killed " in kill_batch.run(tmp_path, kills=3, seed=3)
