"""Short forms of the faults of the ledger; each module says how to run the long one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import kill_ledger, ledger_disk, postgres_outage
from postgres_server import PostgresServer, serve

from mlops_ray.metadata.home import Home, Storage


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    yield from serve()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that an account without rights may enter."""
    folder = Path(tempfile.mkdtemp(prefix="mlops-ray-ledger-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def apart(fault: str, folder: Path, *prefix: str) -> None:
    """Run a fault in a process of its own."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    line = [*prefix, sys.executable, "-m", "faults.ledger_disk", fault, str(folder)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_locked_ledger_is_waited_for_or_said_to_be_locked(tmp_path: Path) -> None:
    ledger_disk.locked(tmp_path, 10)


def test_a_file_that_cannot_grow_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    apart("full_by_limit", tmp_path)


def test_a_full_disk_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("A FULL FILE SYSTEM IS NOT TESTED: only root may mount one")
    apart("full_by_mount", tmp_path, "unshare", "--mount")


def test_a_folder_that_may_only_be_read_is_said_to_be_so(open_folder: Path) -> None:
    apart("read_only", open_folder)


def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    apart("damaged", tmp_path)


def test_a_writer_that_is_killed_loses_and_doubles_nothing(
    ray_cluster: Any, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home", Storage())
    assert kill_ledger.run(home, 3) > 0


def test_a_server_that_goes_and_comes_loses_and_doubles_nothing(server: PostgresServer) -> None:
    assert postgres_outage.run(server, outages=3, cuts=15) > 0
