"""What the online benchmarks share: the data, our stores, a Redis server."""

from __future__ import annotations

import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlops_ray.config.features import Features
from mlops_ray.features.definitions import define

FEATURES = [f"f{number}" for number in range(10)]
VIEW = "facts"
START_US = 1_704_067_200_000_000
AT_US = START_US + 40 * 86_400_000_000
PEER = "feast"


def declare(port: int = 0) -> Features:
    """Declare one view with an int key and ten floats; in Redis where there is a ``port``."""
    return Features.model_validate(
        {
            "sources": {"facts": {"path": "facts.parquet", "available_at": "created_time"}},
            "entities": {"customer": {"keys": {"customer": "int"}}},
            "views": {
                VIEW: {
                    "entity": "customer",
                    "source": "facts",
                    "event_time": "event_time",
                    "columns": FEATURES,
                    "ttl": "3650d",
                }
            },
            "services": {},
            "labels": {
                "source": "facts",
                "id": "id",
                "time": "at",
                "label": "label",
                "known_at": "at",
            },
            "online": {"store": "redis", "url": f"redis://127.0.0.1:{port}/0", "timeout": "30s"}
            if port
            else {},
        }
    )


def facts(rows: int) -> pa.Table:
    """Make a row for each of so many entities, in no order."""
    random = np.random.default_rng(0)
    event_us = START_US + random.integers(0, 30 * 86_400_000_000, rows)
    columns = [random.permutation(rows), event_us, event_us]
    columns += [random.normal(size=rows) for _ in FEATURES]
    schema = define(declare(), VIEW).schema
    values = [pa.array(c).cast(f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.table(values, schema=schema)


def write_parquet(table: pa.Table, path: Path) -> str:
    pq.write_table(table, path)
    return str(path)


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """Run a Redis server without persistence; yields its port."""
    program = shutil.which("redis-server")
    if program is None:
        raise RuntimeError("redis-server is not installed: run setup/servers.sh")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    options = ["--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([program, "--port", str(port), *options], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        yield port
    finally:
        server.terminate()
        server.wait(20)


def row(
    metric: str, unit: str, ours: list[float], theirs: list[float] | None = None
) -> dict[str, Any]:
    """Make one line of the results; for rates more is better, for times less."""
    value = statistics.median(ours)
    peer = statistics.median(theirs) if theirs else None
    better = None if peer is None else (value / peer if unit == "rows/s" else peer / value)
    return {
        "metric": metric,
        "value": value,
        "spread": max(ours) - min(ours),
        "unit": unit,
        "peer": PEER if theirs else None,
        "peer_value": peer,
        "speedup": better,
    }
