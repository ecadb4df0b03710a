"""Feature pipeline: Parquet to committed feature rows on 1, 2 and 4 cores, beside polars on one."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

REPEATS = 5
FILES = 8
DAYS = 60
DAY_US = 86_400_000_000
START_US = 1_700_000_000_000_000
INSTANT = pa.timestamp("us", tz="UTC")


def run(*, quick: bool) -> list[dict[str, Any]]:
    rows = 200_000 if quick else 8_000_000
    repeats = 1 if quick else REPEATS
    counts = [cores for cores in (1, 2, 4) if cores <= len(os.sched_getaffinity(0))]
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_FOLDER")) as name:
        folder = Path(name)
        generate(folder / "raw", rows)
        times: dict[int, list[float]] = {cores: [] for cores in counts}
        theirs: list[float] = []
        for repeat in range(repeats):
            theirs.append(work("polars", folder, 1)["seconds"])
            for cores in counts:
                told = work("ours", folder, cores)
                times[cores].append(told["seconds"])
                if repeat == 0:
                    work("compare", folder, counts[-1])
    return [result(cores, rows, times[cores], theirs) for cores in counts]


def result(cores: int, rows: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    value, peer = rows / statistics.median(ours), rows / statistics.median(theirs)
    import polars as pl

    return {
        "metric": f"rows_per_s_{cores}",
        "value": value,
        "spread": rows / min(ours) - rows / max(ours),
        "unit": "rows/s",
        "peer": f"polars {pl.__version__}, one core",
        "peer_value": peer,
        "speedup": value / peer,
    }


def work(what: str, folder: Path, cores: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._pipeline_work", what, str(folder), str(cores)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"POLARS_MAX_THREADS": "1", "RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def generate(folder: Path, rows: int) -> None:
    """Write sales of shops, in order of time, a file at a time; a tenth are no sales."""
    folder.mkdir()
    random = np.random.default_rng(0)
    shops, each = max(10, rows // 400), rows // FILES
    for number in range(FILES):
        at = np.sort(random.integers(0, DAYS * DAY_US // FILES, each))
        at += START_US + number * (DAYS * DAY_US // FILES)
        amount = np.round(random.lognormal(3, 1, each), 2) * np.where(
            random.random(each) < 0.1, -1, 1
        )
        table = pa.table(
            {
                "shop": (random.random(each) ** 3 * shops).astype(np.int64),
                "at": pa.array(at).cast(INSTANT),
                "amount": pa.array(amount),
                "fee": pa.array(np.round(random.random(each), 2), mask=random.random(each) < 0.05),
                "till": random.integers(1, 9, each),
                "note": random.choice(["cash", "card", "voucher"], each),
            }
        )
        pq.write_table(table, folder / f"sales-{number}.parquet", compression="zstd")
