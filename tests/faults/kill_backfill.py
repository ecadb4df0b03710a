"""Kill a process that backfills a view, again and again, at random moments.

``python -m faults.kill_backfill --kills 50``, in the folder ``tests``. Each round is a process that
backfills two views, one made from the other, and is ended by SIGKILL at a random moment of the time
that this takes. After each kill the tables must be readable, and hold either nothing or everything.
What a round leaves is taken up by the next one; once one gets through, its rows must be, to the bit,
those of an undisturbed run in memory, in both stores, and it begins anew in an empty place.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from mlops_ray.config.features import Features
from mlops_ray.features.columns import from_us
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.tables import write_tables

VIEWS = ("hourly", "again")
HOUR_US = 3_600_000_000
UNTIL = from_us(500 * HOUR_US)
SHOPS = 40


def declare() -> Features:
    view = {"entity": "shop", "every": "1h"}
    return Features.model_validate(
        {
            "sources": {"sales": {"path": "none", "available_at": "at"}},
            "entities": {"shop": {"keys": {"shop": "string"}}},
            "views": {
                "hourly": view
                | {
                    "source": "sales",
                    "event_time": "at",
                    "windows": ["3h", "1d"],
                    "aggregates": {
                        "total": {"by": "sum", "of": "amount"},
                        "tills": {"by": "approx_distinct", "of": "till"},
                    },
                },
                "again": view
                | {
                    "view": "hourly",
                    "windows": ["6h"],
                    "aggregates": {"most": {"by": "max", "of": "total_3h"}},
                },
            },
            "services": {},
            "labels": dict.fromkeys(("source", "id", "time", "label", "known_at"), "sales"),
            "offline": {"buckets": 4},
        }
    )


def run(folder: Path, kills: int, rows: int = 60_000, seed: int = 0) -> str:
    """Go on until so many processes were killed; return what happened."""
    chance = random.Random(seed)
    write_tables(folder / "tables", {"sales": sales(rows)})
    make(folder / "memory", folder / "tables", spread_rows=10**9)
    expected = stored(folder / "memory")
    took_s = round_of(folder, None)
    assert took_s is not None
    judge(folder, expected)
    killed = whole = resumed = 0
    while killed < kills:
        resumed += any((folder / "disk/offline/.backfill").glob("*/*.done"))
        if round_of(folder, chance.random() * took_s) is not None:
            judge(folder, expected)
            whole += 1
        else:
            killed += 1
            partial = stored(folder / "disk")
            assert all(partial[v] in ([], expected[v]) for v in VIEWS), (
                "a part of a backfill is seen"
            )
    assert round_of(folder, None) is not None
    judge(folder, expected)
    return f"{killed} kills, {whole + 1} backfills ended whole, {resumed} went on with parts made before"


def judge(folder: Path, expected: dict[str, list[str]]) -> None:
    """Compare both stores with the undisturbed run, and clear the place."""
    assert stored(folder / "disk") == expected
    now = np.full(SHOPS, 500 * HOUR_US)
    keys = [np.array([f"shop {n}" for n in range(SHOPS)], object)]
    for view in VIEWS:
        ours, theirs = (
            open_online(declare(), folder / place / "online", "faults").read_matrix(view, keys, now)
            for place in ("disk", "memory")
        )
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])
    shutil.rmtree(folder / "disk")


def stored(folder: Path) -> dict[str, list[str]]:
    """Return the rows of each view in one order, as text that tells every bit."""
    offline = OfflineStore(folder / "offline", declare())
    return {view: sorted(map(repr, offline.read(view).to_pylist())) for view in VIEWS}


def round_of(folder: Path, kill_after_s: float | None) -> float | None:
    """Run one process; return how long it took, None where it was killed."""
    command = [sys.executable, "-m", "faults.kill_backfill", "--child", str(folder)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begin\n"
        began = time.monotonic()
        try:
            child.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            return None
        assert child.returncode == 0
        return time.monotonic() - began


def make(folder: Path, tables: Path, spread_rows: int) -> None:
    features = declare()
    offline = OfflineStore(folder / "offline", features)
    online = open_online(features, folder / "online", "faults")
    FeaturePipeline(features, tables, offline, online, spread_rows=spread_rows).advance(UNTIL)


def sales(rows: int) -> pa.Table:
    chance = np.random.default_rng(0)
    at = np.sort(chance.integers(0, 480 * HOUR_US, rows))
    return pa.table(
        {
            "shop": [f"shop {n}" for n in chance.integers(0, SHOPS, rows)],
            "at": pa.array(at).cast(pa.timestamp("us", "UTC")),
            "amount": pa.array(chance.normal(size=rows), mask=chance.random(rows) < 0.1),
            "till": chance.integers(0, 30, rows),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--child", type=Path)
    given = parser.parse_args()
    if given.child is None:
        with tempfile.TemporaryDirectory() as folder:
            print(run(Path(folder), given.kills))
        return
    # Small pieces and parts give many moments at which something is half done.
    from mlops_ray.features import backfill, pieces

    pieces.PIECE_ROWS = 10_000
    backfill.PART_ROWS = 4_000
    print("begin", flush=True)
    make(given.child / "disk", given.child / "tables", spread_rows=1000)


if __name__ == "__main__":
    main()
