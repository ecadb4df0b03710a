"""A disk that is full, a ledger that is locked: a clear error, and the run goes on later."""

from __future__ import annotations

import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from orchestration.bench import Bench

from mlops_ray.errors import LedgerError, MlopsRayError, StepError
from mlops_ray.metadata.home import Home

HERE = "orchestration.sample_steps"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_bench(bench: Bench, small_disk: Path) -> Bench:
    # The ledger is elsewhere: its own full disk is a test of its own.
    home = Home(bench.home.root)
    home.root.mkdir(parents=True, exist_ok=True)
    home.artifacts.symlink_to(small_disk)
    return bench


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    small_bench: Bench, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"
    retries = {"infrastructure": 1, "backoff": {"first": "10ms"}}
    steps: dict[str, dict[str, Any]] = {
        "split": {"uses": f"{HERE}.split", "with": {"count": 3}},
        "big": {
            "uses": f"{HERE}.numbers",
            "with": {"count": 100_000},
            "after": ["split"],
            "retries": retries,
        },
    }
    ballast.write_bytes(bytes(1_600_000))
    with pytest.raises(StepError, match="cannot be written") as caught:
        small_bench.run(small_bench.project(**steps))
    assert "No space left" in str(caught.value)
    (retried,) = small_bench.events("step_retried")
    assert retried["cause"] == "infrastructure"
    ballast.unlink()
    record, states, _ = small_bench.run(small_bench.project(**steps))
    assert record.run_id == caught.value.run_id
    assert set(states.values()) == {"succeeded"}


def test_a_ledger_that_is_locked_for_a_while_only_delays(bench: Bench) -> None:
    bench.run(bench.project(split={"uses": f"{HERE}.split", "with": {"count": 1}}))
    path = bench.home.root / "ledger.db"
    locked = threading.Event()

    def lock() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("begin immediate")
        locked.set()
        time.sleep(4)
        connection.execute("rollback")
        connection.close()

    thread = threading.Thread(target=lock)
    thread.start()
    locked.wait()
    _, states, _ = bench.run(bench.project(split={"uses": f"{HERE}.split", "with": {"count": 2}}))
    thread.join()
    assert states == {"split": "succeeded"}


def test_a_ledger_that_fails_in_the_middle_stops_the_run_which_goes_on_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, dict[str, Any]] = {
        "first": {"uses": f"{HERE}.span", "with": {"name": "first"}, "marks": True},
        "second": {
            "uses": f"{HERE}.span",
            "with": {"name": "$first"},
            "marks": True,
            "mode": "effect",
        },
    }
    executor = bench.executor(bench.project(**steps))
    apply = executor._ledger.apply
    calls = iter(range(1000))

    def fail(writes: Any, **fence: Any) -> None:
        if next(calls) >= 2:
            raise LedgerError("the ledger cannot be written", why="disk full")
        apply(writes, **fence)

    monkeypatch.setattr(executor._ledger, "apply", fail)
    with pytest.raises(MlopsRayError, match="the ledger cannot be written"):
        executor.run()
    (left,) = bench.ledger.runs()
    assert left.status == "running"
    monkeypatch.undo()
    record, states, _ = bench.run(bench.project(**steps))
    assert record.run_id == left.run_id
    assert set(states.values()) == {"succeeded"}
