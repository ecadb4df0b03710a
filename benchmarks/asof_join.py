"""Point-in-time join from disk to a table in memory: our store against polars and DuckDB."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks._peers import python

WORK = Path(__file__).parent / "_feast_join_work.py"
ROWS, LABELS = "rows.parquet", "labels.parquet"
REPEATS = 5
TTL_HOURS = {"ttl_12h": 12, "ttl_180d": 180 * 24}
PEERS = ("polars", "polars_streaming", "duckdb")
LARGE_LIMIT_BYTES = 4 << 30


def run(*, quick: bool) -> list[dict[str, Any]]:
    """Labels × rows: 1M × 5M with peers, 10M × 50M alone; quick 20k × 100k and 40k × 200k.

    Each run is a process of its own, the engines take turns, and all results must be equal. The peer
    is the better of polars (in memory and streaming) and DuckDB, for each figure. Ours also drops
    rows that were not known at the label's time; the data has none, so the results are the same.
    """
    labels, rows, factor = (20_000, 100_000, 2) if quick else (1_000_000, 5_000_000, 10)
    results = []
    with tempfile.TemporaryDirectory(prefix="asof-") as folder:
        work("prepare", folder, 0, labels, rows, 1)
        for name, ttl_hours in TTL_HOURS.items():
            results += compare(name, folder, ttl_hours)
        if not quick:
            results.append(for_the_record(folder, results[0]["value"]))
    with tempfile.TemporaryDirectory(prefix="asof-") as folder:
        work("prepare", folder, 0, factor * labels, factor * rows, 0)
        runs = [work("ours", folder, TTL_HOURS["ttl_180d"], limit=True) for _ in range(REPEATS)]
        results.append(row("large_peak_mib", "MiB", [run["mib"] for run in runs]))
        results.append(row("large_s", "s", [run["s"] for run in runs]))
    return results


def compare(name: str, folder: str, ttl_hours: int) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(REPEATS):
        for engine in ("ours", *PEERS):
            runs[engine].append(work(engine, folder, ttl_hours))
    digests = {run["digest"] for done in runs.values() for run in done}
    assert len(digests) == 1, f"the engines disagree: {runs}"
    figures = {
        figure: {engine: [run[figure] for run in done] for engine, done in runs.items()}
        for figure in ("s", "mib")
    }
    return [
        row(f"{name}_s", "s", figures["s"].pop("ours"), figures["s"]),
        row(f"{name}_peak_mib", "MiB", figures["mib"].pop("ours"), figures["mib"]),
    ]


def for_the_record(folder: str, ours_s: float) -> dict[str, Any]:
    """Feast on the same files with a TTL of 12 hours, once: it takes long, and memory."""
    hours = TTL_HOURS["ttl_12h"]
    files = (str(Path(folder) / ROWS), str(Path(folder) / LABELS))
    done = subprocess.run(
        [str(python("feast")), str(WORK), folder, str(hours), *files],
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["found"] == work("ours", folder, hours)["found"]
    line = row("feast_12h_s", "s", [ours_s], {"feast 0.67, DuckDB store, one run": [told["s"]]})
    return line | {"spread": None}


def row(
    metric: str, unit: str, ours: list[float], theirs: dict[str, list[float]] | None = None
) -> dict[str, Any]:
    value = statistics.median(ours)
    medians = {engine: statistics.median(found) for engine, found in (theirs or {}).items()}
    peer = min(medians, key=lambda engine: medians[engine]) if medians else None
    return {
        "metric": metric,
        "value": value,
        "spread": max(ours) - min(ours),
        "unit": unit,
        "peer": peer,
        "peer_value": medians[peer] if peer else None,
        "speedup": medians[peer] / value if peer else None,
    }


def work(engine: str, folder: str, ttl_hours: int, *more: int, limit: bool = False) -> Any:
    """Run an engine in a process of its own; return what it says."""
    arguments = [engine, folder, str(ttl_hours), *map(str, more)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._asof_work", *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_memory if limit else None,
    )
    if done.returncode:
        raise RuntimeError(f"{engine} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def limit_memory() -> None:
    """Let the process hold no more than 4 GiB of memory of its own (Linux: RLIMIT_DATA)."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (LARGE_LIMIT_BYTES, LARGE_LIMIT_BYTES))
