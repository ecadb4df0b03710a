"""Steps in a chain, fan-out and a cached run, all durable: against Prefect, Dagster and Ray alone."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks._peers import Worker
from benchmarks._workflow_work import (
    ROOT,
    DurableRay,
    Ours,
    RawRay,
    memory_mib,
    reset_peak,
)

REPEATS = 5
PEERS = ("prefect", "dagster")
PEERS_MOST_CALLS = 1_000

Engine = Callable[[str, int], float]


def run(*, quick: bool) -> list[dict[str, Any]]:
    """Each figure is a whole run's time, from the declaration to the output, by its steps or calls.

    The engines take turns, after a round to warm up; medians of five. All but ``raw_ray`` keep each
    output in a file and each state in SQLite; ours also syncs both to the disk, which of the others
    only ``durable_ray`` does. Ray, Prefect's server and Dagster's instance are up before. Of Prefect's
    task runners it is the threads, of Dagster's executors the one in its own process, which is the
    faster by far (the other runs once, for its figure). At 10,000 calls the peers are given
    1,000: a run of 10,000 would take them many minutes. Last, a registered model is made again by
    ``mlops-ray reproduce``, which fails unless its digests are the same.
    """
    repeats = 1 if quick else REPEATS
    steps, calls, cached, most = (5, 10, 20, 200) if quick else (20, 200, 200, 10_000)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="orchestration-") as name, _ray():
        folder = Path(name)
        with _engines(folder) as engines:
            for what, count, kind in (("chain", steps, "step"), ("fanout", calls, "task")):
                found = _rounds(engines, what, count, repeats)
                scaled = {e: [s / count * 1000 for s in taken] for e, taken in found.items()}
                results += _rows(f"{what}_{count}_ms_per_{kind}", "ms", scaled)
            some = {name: engines[name] for name in ("ours", "prefect")}
            results += _rows(f"cached_{cached}_s", "s", _rounds(some, "cached", cached, repeats))
            results += _fanouts(engines, most, repeats)
        if not quick:
            results += _multiprocess(folder)
    if not quick:
        results.append(_reproduction())
    return results


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    from mlops_ray.cluster.connect import connect
    from mlops_ray.config.project import Cluster

    connect(Cluster(address="local"), roots=[ROOT])
    import ray

    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _engines(folder: Path) -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        prefect = Worker("prefect", "_prefect_work.py", str(folder / "prefect"))
        dagster = Worker("dagster", "_dagster_work.py", str(folder / "dagster"), "in_process")
        yield {
            "ours": Ours(folder / "ours"),
            "prefect": stack.enter_context(prefect),
            "dagster": stack.enter_context(dagster),
            "raw_ray": RawRay(),
            "durable_ray": DurableRay(folder / "durable_ray"),
        }


def _rounds(
    engines: dict[str, Engine], what: str, count: int, repeats: int
) -> dict[str, list[float]]:
    """Let the engines take turns; the first round only warms up."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats + 1):
        for name, engine in engines.items():
            gc.collect()
            found[name].append(engine(what, count))
    return {name: taken[1:] for name, taken in found.items()}


def _fanouts(engines: dict[str, Engine], most: int, repeats: int) -> list[dict[str, Any]]:
    """Measure three sizes of fan-out, to see whether it is linear, and the driver's memory."""
    results = []
    peers = {name: engines[name] for name in PEERS}
    theirs = {
        name: [seconds / (most // 10) * 1000 for seconds in taken]
        for name, taken in _rounds(peers, "fanout", min(PEERS_MOST_CALLS, most // 10), 1).items()
    }
    for count in (most // 10, most // 2, most):
        taken, grown = [], []
        for _ in range(repeats):
            gc.collect()
            before = memory_mib("VmRSS")
            reset_peak()
            taken.append(engines["ours"]("fanout", count) / count * 1000)
            grown.append(memory_mib("VmHWM") - before)
        found = {"ours": taken} | (theirs if count == most else {})
        results += _rows(f"fanout_{count}_ms_per_task", "ms", found, own=False)
        results.append(_row(f"fanout_{count}_driver_mib", "MiB", grown))
    return results


def _multiprocess(folder: Path) -> list[dict[str, Any]]:
    where = str(folder / "multiprocess")
    results = []
    with Worker("dagster", "_dagster_work.py", where, "multiprocess") as dagster:
        for what, count, kind in (("chain", 20, "step"), ("fanout", 200, "task")):
            taken = [dagster(what, count) / count * 1000]
            results.append(_row(f"dagster_processes_{what}_{count}_ms_per_{kind}", "ms", taken))
    return results


def _reproduction() -> dict[str, Any]:
    """Train and register the small flights model, make it again, and say how long that took."""
    with tempfile.TemporaryDirectory(prefix="reproduction-") as home:
        line = [sys.executable, "-m", "mlops_ray"]
        given = {"cwd": ROOT, "env": os.environ | {"MLOPS_RAY_HOME": home}, "text": True}
        train = [*line, "run", "workflow=train", "project=flights_quick"]
        subprocess.run(train, check=True, stdout=subprocess.DEVNULL, **given)
        began = time.perf_counter()
        again = [*line, "reproduce", "flights_quick@1"]
        done = subprocess.run(again, check=True, stdout=subprocess.PIPE, **given)
        seconds = time.perf_counter() - began
    verdict = done.stdout.strip().splitlines()[-1]
    assert verdict.startswith("identical"), verdict
    return {**_row("reproduce_flights_quick_s", "s", [seconds]), "verdict": verdict}


def _rows(
    metric: str, unit: str, found: dict[str, list[float]], *, own: bool = True
) -> list[dict[str, Any]]:
    """Make a line for us beside the faster peer, and one for each of the others."""
    peers = {name: statistics.median(found[name]) for name in PEERS if name in found}
    peer = min(peers, key=peers.__getitem__) if peers else None
    results = [_row(metric, unit, found["ours"], peer, peers[peer] if peer else None)]
    if own:
        others = [name for name in found if name != "ours"]
        results += [_row(f"{name}_{metric}", unit, found[name]) for name in others]
    return results


def _row(
    metric: str,
    unit: str,
    values: list[float],
    peer: str | None = None,
    peer_value: float | None = None,
) -> dict[str, Any]:
    value = statistics.median(values)
    return {
        "metric": metric,
        "value": value,
        "best": min(values),
        "spread": max(values) - min(values),
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "speedup": None if peer_value is None else peer_value / value,
    }
