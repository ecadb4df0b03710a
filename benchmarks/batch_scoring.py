"""Batch scoring, Parquet to Parquet, beside one process with pyarrow and torch times the cores."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPEATS = 5
COPIES = 10


def run(*, quick: bool) -> list[dict[str, Any]]:
    """10M rows (quick: 200k): ours on all cores, the peer on one core and with threads on all.

    Each run is a process of its own, they take turns, and the results must be equal. Ours also checks
    every row, counts features and scores, and can go on after a kill. Interpreter, imports and Ray are
    up before the clock starts, for both. The same rows ten times over show what memory grows with.
    """
    rows, repeats = (200_000, 1) if quick else (10_000_000, REPEATS)
    cores = len(os.sched_getaffinity(0))
    times: dict[str, list[float]] = {"ours": [], "one core": [], "threads": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        folder = Path(name)
        work("prepare", folder, rows)
        memory = []
        for repeat in range(repeats):
            times["one core"].append(work("peer", folder, 1)["seconds"])
            told = work("ours", folder, cores)
            times["ours"].append(told["seconds"])
            memory.append(told["mib"])
            if repeat == 0:
                work("compare", folder, cores)
            times["threads"].append(work("peer", folder, cores)["seconds"])
        (folder / "peer.parquet").unlink()
        shutil.rmtree(folder / "ours")
        tenfold = work("ours", folder, cores, COPIES)
    return [
        compared("rows_per_s", rows, times["ours"], times["one core"], cores),
        compared("rows_per_s_threads", rows, times["ours"], times["threads"], 1),
        plain("peak_mib", "MiB", statistics.median(memory)),
        plain("peak_mib_tenfold", "MiB", tenfold["mib"]),
        plain("rows_per_s_tenfold", "rows/s", COPIES * rows / tenfold["seconds"]),
    ]


def compared(
    metric: str, rows: int, ours: list[float], theirs: list[float], factor: int
) -> dict[str, Any]:
    value = rows / statistics.median(ours)
    peer = factor * rows / statistics.median(theirs)
    name = f"pyarrow and torch, one core × {factor}" if factor > 1 else "pyarrow and torch, threads"
    return plain(metric, "rows/s", value) | {
        "spread": rows / min(ours) - rows / max(ours),
        "peer": name,
        "peer_value": peer,
        "speedup": value / peer,
    }


def plain(metric: str, unit: str, value: float) -> dict[str, Any]:
    return {"metric": metric, "value": value, "unit": unit} | dict.fromkeys(
        ("peer", "peer_value", "speedup", "spread")
    )


def work(what: str, folder: Path, *numbers: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._batch_work", what, str(folder), *map(str, numbers)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told
