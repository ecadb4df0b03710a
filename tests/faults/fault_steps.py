"""Steps of the workflow that is killed: each takes a moment, says which process it is in, and gives
the same output whenever it runs. Effects leave a line on disk each time they happen."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from mlops_ray.config.base import Frozen

EFFECTS = "effects"
PROCESSES = "processes"


class Verdict(Frozen):
    passed: bool
    score: int


@contextmanager
def work(marks: Path, seconds: float = 0.03) -> Iterator[None]:
    """Take a moment in which a killer finds this process."""
    mark = marks / PROCESSES / str(os.getpid())
    mark.touch()
    try:
        time.sleep(seconds)
        yield
    finally:
        mark.unlink(missing_ok=True)


def happen(marks: Path, name: str) -> None:
    """Make an effect durable: one line with its name and process, appended whole and synced."""
    line = f"{name} {os.getpid()}\n".encode()
    descriptor = os.open(marks / EFFECTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parts(marks: Path, count: int) -> list[int]:
    with work(marks):
        return list(range(count))


def square(marks: Path, part: int) -> int:
    with work(marks, 0.02 + 0.01 * (part % 3)):
        return part * part


def fold(marks: Path, values: list[int]) -> int:
    with work(marks):
        result = 17
        for value in values:
            result = (result * 31 + value) % 1_000_003
        return result


def table(marks: Path, values: list[int]) -> pa.Table:
    with work(marks):
        return pa.table({"n": values, "half": [value / 2 for value in values]})


def files(marks: Path, table: pa.Table, name: str) -> Path:
    with work(marks):
        folder = marks / "made" / f"{name}-{secrets.token_hex(4)}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "sum.txt").write_text(str(sum(table["n"].to_pylist())))
        (folder / "count.txt").write_text(str(table.num_rows))
        return folder


def read(marks: Path, folder: Path) -> int:
    with work(marks):
        return int((folder / "deep" / "sum.txt").read_text())


def flaky(marks: Path, value: int) -> int:
    with work(marks):
        failed = marks / f"failed-{value}"
        if not failed.exists():
            failed.touch()
            raise ConnectionError("the first time it fails")
        return value + 1


def judge(marks: Path, value: int) -> Verdict:
    with work(marks):
        return Verdict(passed=value >= 0, score=7)


def effect(marks: Path, name: str, value: int) -> int:
    with work(marks, 0.05):
        happen(marks, name)
        time.sleep(0.05)
        return value + 1


def effect_of(marks: Path, name: str, part: int) -> int:
    with work(marks, 0.03):
        happen(marks, f"{name}[{part}]")
        time.sleep(0.03)
        return part + 100


def ensure(marks: Path, name: str, value: int) -> str:
    with work(marks):
        happen(marks, name)
        return f"up: {value}"
