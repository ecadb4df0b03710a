"""Steps for the tests of orchestration: small, but real functions in a real module."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from mlops_ray.config.base import Frozen
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
