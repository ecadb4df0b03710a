"""Our side of the orchestration benchmark, and Ray by itself at the same work."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from mlops_ray.config.workflow import Workflow
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.orchestration.executor import Executor
from mlops_ray.orchestration.spec import RunSpec

ROOT = Path(__file__).parent.parent
STEPS = "benchmarks._workflow_steps"


def expected(what: str, count: int, start: int) -> int:
    return sum(range(start + 1, start + count + 1)) if what == "fanout" else start + count


class Ours:
    """The executor, with everything that it keeps of a run. Each run has inputs of its own."""

    def __init__(self, home: Path) -> None:
        self._home = Home(home, Storage())
        self._start = 0

    def __call__(self, what: str, count: int) -> float:
        if what != "cached":
            self._start += 1_000_000
        start = 0 if what == "cached" else self._start
        declare = _fanout if what == "fanout" else _chain
        workflow = Workflow.model_validate(declare(what, count, start))
        began = time.perf_counter()
        spec = RunSpec(
            project="bench",
            workflow=workflow,
            home=self._home,
            config={"start": start},
            config_digest=hashlib.blake2b(f"{what} {count} {start}".encode()).hexdigest(),
            packages=("benchmarks",),
            directory=ROOT,
            roots=(str(ROOT),),
        )
        executor = Executor(spec)
        run = executor.run(fresh=True)
        seconds = time.perf_counter() - began
        last = "total" if what == "fanout" else f"s{count - 1}"
        made = executor.output(run.run_id, last)
        assert made == expected(what, count, start), (what, made)
        return seconds


def _chain(what: str, count: int, start: int) -> dict[str, Any]:
    values = [start, *(f"$s{number}" for number in range(count - 1))]
    uses = f"{STEPS}.add_one"
    steps = {f"s{n}": {"uses": uses, "with": {"value": value}} for n, value in enumerate(values)}
    return {"name": f"{what}_{count}", "steps": steps}


def _fanout(what: str, count: int, start: int) -> dict[str, Any]:
    given = {"count": count, "start": start}
    steps = {
        "numbers": {"uses": f"{STEPS}.numbers", "with": given},
        "added": {"uses": f"{STEPS}.add_one", "map": {"value": "$numbers"}},
        "total": {"uses": f"{STEPS}.total", "with": {"values": "$added"}},
    }
    return {"name": f"{what}_{count}", "steps": steps}


class RawRay:
    """Ray alone: nothing is kept."""

    def __init__(self) -> None:
        import ray

        from benchmarks._workflow_steps import add_one

        self._ray = ray
        self._add_one = ray.remote(add_one)
        self._start = 0

    def __call__(self, what: str, count: int) -> float:
        self._start += 1
        began = time.perf_counter()
        if what == "chain":
            value = self._start
            for _ in range(count):
                value = self._add_one.remote(value)
            made = self._ray.get(value)
        else:
            values = range(self._start, self._start + count)
            made = sum(self._ray.get([self._add_one.remote(value) for value in values]))
        seconds = time.perf_counter() - began
        assert made == expected(what, count, self._start), (what, made)
        return seconds


class DurableRay:
    """Ray with the least that durability asks: each output a synced file, each task a synced row.

    No cache, no keys, no logs, no events: a floor for what keeps its results.
    """

    def __init__(self, folder: Path) -> None:
        import ray

        folder.mkdir(parents=True)
        self._ray = ray
        self._folder = str(folder)
        self._task = ray.remote(_kept)
        self._rows = sqlite3.connect(folder / "rows.db", isolation_level=None)
        self._rows.execute("pragma journal_mode=wal")
        self._rows.execute("pragma synchronous=full")
        self._rows.execute("create table tasks (run integer, number integer, digest text)")
        self._start = 0

    def __call__(self, what: str, count: int) -> float:
        self._start += 1_000_000
        began = time.perf_counter()
        made = self._chain(count) if what == "chain" else self._fanout(count)
        seconds = time.perf_counter() - began
        assert made == expected(what, count, self._start), (what, made)
        return seconds

    def _chain(self, count: int) -> int:
        value = self._start
        for number in range(count):
            value, digest = self._ray.get(self._task.remote(self._folder, value))
            self._keep([(self._start, number, digest)])
        return value

    def _fanout(self, count: int) -> int:
        values = range(self._start, self._start + count)
        numbers = {self._task.remote(self._folder, v): n for n, v in enumerate(values)}
        waiting, made = list(numbers), 0
        while waiting:
            done, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=0.02)
            results = self._ray.get(done)
            made += sum(value for value, _ in results)
            rows = [
                (self._start, numbers[ref], digest)
                for ref, (_, digest) in zip(done, results, strict=True)
            ]
            self._keep(rows)
        return made

    def _keep(self, rows: list[tuple[int, int, str]]) -> None:
        self._rows.execute("begin immediate")
        self._rows.executemany("insert into tasks values (?, ?, ?)", rows)
        self._rows.execute("commit")


def _kept(folder: str, value: int) -> tuple[int, str]:
    content = json.dumps(value + 1).encode()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    temporary = f"{folder}/{digest}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, f"{folder}/{digest}")
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return value + 1, digest


def reset_peak() -> None:
    """Let the kernel measure this process's peak memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_mib(what: str) -> float:
    """Return ``VmRSS``, memory now, or ``VmHWM``, its peak, of this process."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024
