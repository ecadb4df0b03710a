"""Faults of the disk below a SQLite ledger: locked, full, read-only, damaged.

Each is found in words, and what was acknowledged before is there afterwards. They run in a process
of their own, because they need limits or an account that the tests' process must not have:
``python -m faults.ledger_disk damaged FOLDER``, in ``tests`` with ``PYTHONPATH=..``
"""

from __future__ import annotations

import os
import pwd
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.ledger import Ledger

_HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
connection.execute("ROLLBACK")
"""


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'ledger.db'}"


def locked(folder: Path, seconds: float) -> None:
    """Another process holds the write lock: one who waits longer succeeds, others say so."""
    patient, hasty = Ledger(url_of(folder)), Ledger(url_of(folder), patience_s=0.2)
    patient.append("shop", "before", {})
    line = [sys.executable, "-c", _HOLD, str(folder / "ledger.db"), str(seconds)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LedgerError, match="locked by another process"):
            hasty.append("shop", "hasty", {})
        assert [event.kind for event in hasty.events()] == ["before"]
        assert holder.poll() is None
        patient.append("shop", "patient", {})
    assert [event.kind for event in patient.events()] == ["before", "patient"]


def full(folder: Path) -> int:
    """Write until the disk is full; return how many events were acknowledged and are there."""
    ledger = Ledger(url_of(folder))
    acknowledged: list[int] = []
    with pytest.raises(LedgerError, match="cannot be written to its disk") as refused:
        _fill(ledger, acknowledged)
    assert "free some space" in refused.value.fix
    _check_numbers(ledger, len(acknowledged))
    return len(acknowledged)


def _fill(ledger: Ledger, acknowledged: list[int]) -> None:
    for number in range(10_000):
        ledger.append("shop", "fill", {"n": number, "text": "x" * 2000})
        acknowledged.append(number)


def full_by_limit(folder: Path) -> None:
    """A file that may not grow further stands for a full disk; afterwards writing goes on."""
    Ledger(url_of(folder)).close()
    limit = 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    acknowledged = full(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ledger = Ledger(url_of(folder))
    ledger.append("shop", "fill", {"n": acknowledged})
    _check_numbers(ledger, acknowledged + 1)


def full_by_mount(folder: Path) -> None:
    """A file system of 2 MB; this process has a mount namespace of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(600_000))
    acknowledged = full(folder)
    ballast.unlink()
    ledger = Ledger(url_of(folder))
    ledger.append("shop", "fill", {"n": acknowledged})
    _check_numbers(ledger, acknowledged + 1)


def read_only(folder: Path) -> None:
    """A folder and file that this account may only read."""
    nobody = pwd.getpwnam("nobody")
    Ledger(url_of(folder)).append("shop", "kept", {})
    folder.chmod(0o555)
    (folder / "ledger.db").chmod(0o444)
    if os.geteuid() == 0:
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
    for work in (lambda: Ledger(url_of(folder)).append("shop", "x", {}), lambda: _new(folder)):
        with pytest.raises(LedgerError, match="writ") as refused:
            work()
        assert "MLOPS_RAY_HOME" in refused.value.fix


def damaged(folder: Path) -> None:
    """Pages are overwritten, or the file is something else."""
    ledger = Ledger(url_of(folder))
    for number in range(200):
        ledger.append("shop", "fill", {"n": number, "text": "x" * 500})
    ledger.close()
    with sqlite3.connect(folder / "ledger.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    size = (folder / "ledger.db").stat().st_size
    with (folder / "ledger.db").open("r+b") as file:
        file.seek(size // 3)
        file.write(os.urandom(size // 3))
    _expect_damage(lambda: Ledger(url_of(folder)).events())
    (folder / "other").mkdir()
    (folder / "other" / "ledger.db").write_text("this is no ledger" * 1000)
    _expect_damage(lambda: Ledger(url_of(folder / "other")))


def _expect_damage(work: Callable[[], object]) -> None:
    with pytest.raises(LedgerError, match="damaged") as refused:
        work()
    assert "put a copy of it back" in refused.value.fix


def _new(folder: Path) -> None:
    Ledger(url_of(folder / "new"))


def _check_numbers(ledger: Ledger, count: int) -> None:
    assert [event.data["n"] for event in ledger.events(kind="fill")] == list(range(count))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
