"""The workflow that is killed, in its short form; by hand it is a hundred seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.timeout(600)
def test_a_workflow_survives_whatever_is_killed() -> None:
    """In a process of its own: it starts a cluster of two nodes and loses one of them."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    done = subprocess.run(
        [sys.executable, "-m", "faults.kill_workflow", "--seeds", "5"],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "5 seeds, two at once, one paused" in done.stdout
