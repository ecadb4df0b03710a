"""From the offline store to LMDB and Redis, 10 features: rows per second on one core, against Feast."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._online_work import (
    AT_US,
    VIEW,
    declare,
    facts,
    redis_server,
    row,
    write_parquet,
)
from benchmarks._peers import Worker
from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online

REPEATS = 5


def run(*, quick: bool) -> list[dict[str, Any]]:
    """A full materialisation of a row for each entity, the offline read included; medians of five.

    This process keeps to one core (Redis is a process of its own). Feast gets the first twentieth of
    the same rows, as Parquet: its rate does not grow with their number, and all of them would take it
    minutes. Its online store is SQLite beside LMDB, and the same Redis server.
    """
    rows = 20_000 if quick else 1_000_000
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="materialize-") as name,
        redis_server(Path(name)) as port,
    ):
        folder = Path(name)
        table = facts(rows)
        OfflineStore(folder / "offline", declare()).append(VIEW, table, AT_US)
        data = write_parquet(table.slice(0, rows // 20), folder / "facts.parquet")
        allowed = os.sched_getaffinity(0)
        for store, theirs in (("lmdb", "sqlite"), ("redis", "redis")):
            arguments = [theirs, str(folder / theirs), str(port), data]
            with Worker("feast", "_feast_work.py", *arguments) as feast:
                ours, peer = [], []
                for turn in range(REPEATS):
                    os.sched_setaffinity(0, {sorted(allowed)[0]})
                    ours.append(_rate(folder, turn, port if store == "redis" else 0, table))
                    os.sched_setaffinity(0, allowed)
                    peer.append(rows // 20 / feast("materialize"))
                results.append(row(f"{store}_rows_per_s", "rows/s", ours, peer))
    return results


def _rate(folder: Path, turn: int, port: int, table: Any) -> float:
    features = declare(port)
    offline = OfflineStore(folder / "offline", features)
    online = open_online(features, folder / f"online-{turn}", f"bench-{turn}")
    began = time.perf_counter()
    materialize_view(offline, online, VIEW)
    rate = table.num_rows / (time.perf_counter() - began)
    keys = table["customer"].to_numpy()[:1000]
    matrix, _ = online.read_matrix(VIEW, [keys], np.full(len(keys), AT_US))
    assert np.array_equal(matrix[:, 3], table["f3"].to_numpy()[:1000])
    online.clear()
    return rate
