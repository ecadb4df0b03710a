"""Steps for the tests of orchestration: small, but real functions in a real module."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlops_ray.config.base import Frozen
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.orchestration.context import Context


class Total(Frozen):
    value: int
    even: bool


def numbers(count: int) -> pa.Table:
    return pa.table({"n": list(range(count))})


def total(context: Context, table: pa.Table, marks: Path) -> Total:
    mark(marks, "total")
    context.reporter.metric("total", float(sum(table["n"].to_pylist())))
    value = sum(table["n"].to_pylist())
    return Total(value=value, even=value % 2 == 0)


def folder(context: Context, total: Total) -> Path:
    path = context.home.run(context.run_id) / "made"
    path.mkdir(parents=True, exist_ok=True)
    (path / "total.txt").write_text(str(total.value))
    return path


def read(folder: Path, extra: list[int]) -> str:
    return (folder / "total.txt").read_text() + "".join(map(str, extra))


def report_odd(context: Context) -> int:
    context.reporter.param("grid", {(1, 2): 3})
    return 1


def give_up(marks: Path) -> int:
    mark(marks, "give_up")
    raise asyncio.CancelledError("nope")


def announce(context: Context, marks: Path) -> int:
    mark(marks, "announce")
    context.reporter.writes("model", "m@1")
    context.reporter.progress(rows=7, message="sent")
    return 1


def effect(marks: Path) -> int:
    mark(marks, "effect")
    return 1


def fail_once(marks: Path, effect: int) -> int:
    if not (marks / "failed").exists():
        (marks / "failed").touch()
        raise ValueError("the first time it fails")
    mark(marks, "after")
    return effect + 1


def die(marks: Path) -> int:
    mark(marks, "die")
    os._exit(3)


def mark(folder: Path, name: str) -> None:
    with (folder / name).open("a") as file:
        file.write("x")


def split(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def square(marks: Path, number: int) -> int:
    mark(marks, f"square {number}")
    return number * number


def weigh(number: int, weight: float) -> dict[str, float]:
    return {"number": number, "weighed": number * weight}


def rows(number: int) -> pa.Table:
    return pa.table({"n": [number] * (number + 1)})


def height(table: pa.Table) -> int:
    return int(table.num_rows)


def add(values: list[int]) -> int:
    return sum(values)


def collect(values: list[Any]) -> list[Any]:
    return values


def tables(values: list[pa.Table]) -> list[int]:
    return [int(value.num_rows) for value in values]


def square_once_broken(marks: Path, number: int) -> int:
    if number == 3 and not (marks / "failed").exists():
        (marks / "failed").touch()
        raise ValueError("three is not liked")
    mark(marks, f"square {number}")
    return number * number


def hundredth_fails(marks: Path, number: int) -> int:
    mark(marks, f"call {number}")
    if number == 100 and not (marks / "good").exists():
        raise ValueError("a hundred is not liked")
    return number


def hundredth_dies(number: int) -> int:
    if number == 100:
        os._exit(3)
    return number


def chance(marks: Path) -> str:
    mark(marks, "chance")
    return os.urandom(8).hex()


def effect_of(marks: Path, value: Any) -> dict[str, Any]:
    mark(marks, "effect")
    return {"sent": 5}


def wait_for_good(marks: Path, value: Any) -> Any:
    if not (marks / "good").exists():
        raise ValueError("not yet")
    return value


def span(marks: Path, name: str, seconds: float = 0.3) -> str:
    """Leave a file that says from when to when the step ran, and where."""
    began = time.time()
    time.sleep(seconds)
    (marks / f"span {name}").write_text(f"{began} {time.time()} {os.getpid()}")
    return name


def sleep(marks: Path, seconds: float, name: str = "slept") -> float:
    mark(marks, f"{name} begun")
    time.sleep(seconds)
    mark(marks, name)
    return seconds


def slow_once(marks: Path) -> str:
    if not (marks / "slow").exists():
        (marks / "slow").touch()
        time.sleep(60)
    return "quick"


def stubborn(marks: Path) -> None:
    mark(marks, "stubborn begun")
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def die_once(marks: Path) -> int:
    if not (marks / "died").exists():
        (marks / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


_KNOWN: dict[str, int] = {}


def remember(number: int) -> int:
    """Return how many numbers this process has seen before."""
    _KNOWN[str(number)] = number
    return len(_KNOWN) - 1


def variable(name: str) -> str | None:
    return os.environ.get(name)


def version_of(package: str) -> str:
    return importlib.metadata.version(package)


def forget_input(context: Context, digest: str) -> str:
    """Break an artifact behind everybody's back."""
    open_artifacts(context.home).path(digest).unlink()
    return digest


def digest_of(context: Context, step: str) -> str:
    records = open_ledger(context.home).steps(context.run_id)
    return next(r.output.digest for r in records if r.name == step and r.output is not None)


class Odd:
    """What only pickle can store."""

    def __init__(self, number: int) -> None:
        self.number = number


def odd(number: int) -> Odd:
    return Odd(number)


def number_of(odd: Odd) -> int:
    return odd.number


def shout(number: int) -> int:
    print("from python", number)
    subprocess.run(["echo", f"from a child {number}"], check=True)
    return number


def say(context: Context, seconds: float) -> int:
    context.reporter.progress(rows=7, message="half way")
    time.sleep(seconds)
    context.reporter.progress(rows=8, message="nearly")
    time.sleep(seconds)
    context.reporter.event("said", seconds=seconds)
    context.reporter.writes("model", "tiny@1")
    return 8
