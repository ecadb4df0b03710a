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
MORE, TENFOLD = 4, 10


def run(*, quick: bool) -> list[dict[str, Any]]:
    """10M rows and, of the same files, four times as many (quick: 200k): ours on all cores, the peer
    on one core, on each core at once, and with threads on all.

    Each run is a process of its own, they take turns, and the results must be equal. The peer's clock
    starts when its imports and its model are there. Ours starts processes within the call, whatever
    it is given to do: ``rows_per_s`` is what the further rows cost, ``start_s`` what comes on top of
    it, ``whole_rows_per_s`` both. Ours also checks every row, counts features and scores, and can go
    on after a kill. Ten times the rows show what memory grows with.
    """
    rows, repeats = (200_000, 1) if quick else (10_000_000, REPEATS)
    cores = len(os.sched_getaffinity(0))
    times: dict[str, list[float]] = {"once": [], "more": [], "core": [], "each": [], "threads": []}
    memory = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        folder = Path(name)
        work("prepare", folder, rows)
        for repeat in range(repeats):
            times["core"].append(work("peer", folder, 1)["seconds"])
            told = work("ours", folder, cores)
            times["once"].append(told["seconds"])
            memory.append(told["mib"])
            if repeat == 0:
                work("compare", folder, cores)
            times["each"].append(work("peers", folder, cores)["seconds"])
            times["threads"].append(work("peer", folder, cores)["seconds"])
            times["more"].append(work("ours", folder, cores, MORE)["seconds"])
        (folder / "peer.parquet").unlink()
        shutil.rmtree(folder / "ours")
        tenfold = work("ours", folder, cores, TENFOLD)
    pairs = list(zip(times["more"], times["once"], strict=True))
    further_s = [(more - once) / (MORE - 1) for more, once in pairs]
    start_s = [once - further for once, further in zip(times["once"], further_s, strict=True)]
    core = f"pyarrow and torch, one core × {cores}"
    return [
        compared("rows_per_s", rows, further_s, core, times["core"], cores),
        compared("whole_rows_per_s", rows, times["once"], core, times["core"], cores),
        compared(
            "rows_per_s_each_core", rows, further_s, f"{cores} of them at once", times["each"], 1
        ),
        compared("rows_per_s_threads", rows, further_s, "the same, threads", times["threads"], 1),
        plain("start_s", "s", statistics.median(start_s)),
        plain("peak_mib", "MiB", statistics.median(memory)),
        plain("peak_mib_tenfold", "MiB", tenfold["mib"]),
    ]


def compared(
    metric: str, rows: int, ours: list[float], name: str, theirs: list[float], factor: int
) -> dict[str, Any]:
    value = rows / statistics.median(ours)
    peer = factor * rows / statistics.median(theirs)
    return plain(metric, "rows/s", value) | {
        "spread": rows / min(ours) - rows / max(ours),
        "peer": name,
        "peer_value": peer,
        "speedup": value / peer,
    }


def plain(metric: str, unit: str, value: float) -> dict[str, Any]:
    nothing = dict.fromkeys(("peer", "peer_value", "speedup", "spread"))
    return {"metric": metric, "value": value, "unit": unit} | nothing


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
