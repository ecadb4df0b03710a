"""Online reads of 10 features, 1 and 100 entities at a time: LMDB and Redis against Feast."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import redis

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
from mlops_ray.features.online import open_online
from mlops_ray.features.online.encoding import encode_keys
from mlops_ray.features.online.layout import stored_view
from mlops_ray.features.online.rows import newest_rows

REPEATS = 5
SIZES = (1, 100)

Read = Callable[[list[list[int]]], list[float]]


def run(*, quick: bool) -> list[dict[str, Any]]:
    """Each figure is the median of five blocks' medians; the stores take turns.

    Ours is ``Reader.read``, from arrays of keys to the matrix and the statuses; the raw figures are
    the same packed bytes by keys made before, fetched by the clients alone and not decoded. Feast's is
    ``get_online_features(...).to_dict()``, from SQLite beside LMDB and from the same Redis server.
    """
    entities, reads = (2_000, 100) if quick else (100_000, 1_000)
    results = []
    with tempfile.TemporaryDirectory(prefix="online-") as name:
        folder = Path(name)
        table = facts(entities)
        data = write_parquet(table, folder / "facts.parquet")
        with redis_server(folder) as port:
            for store, theirs in (("lmdb", "sqlite"), ("redis", "redis")):
                ours, raw = _fill(store, folder, port if store == "redis" else 0, table)
                arguments = [theirs, str(folder / theirs), str(port), data]
                with Worker("feast", "_feast_work.py", *arguments) as feast:
                    feast("materialize")
                    _check(ours, feast, entities)
                    engines = {
                        "ours": _timed(ours, lambda keys: keys),
                        "raw": _timed(raw, lambda keys: encode_keys(b"raw", [keys])),
                        "feast": lambda asked, feast=feast: feast("read", asked),
                    }
                    for size in SIZES:
                        found = _measure(engines, entities, size, reads)
                        head = f"{store}_{size}_p50_us"
                        results.append(row(head, "us", found["ours"], found["feast"]))
                        results.append(row(f"raw_{head}", "us", found["raw"]))
    return results


def _fill(store: str, folder: Path, port: int, table: Any) -> tuple[Any, Any]:
    """Fill our store and a raw one; return the functions that read from each."""
    features = declare(port)
    online = open_online(features, folder / "ours", "bench")
    online.write(VIEW, table)
    reader = online.reader([VIEW])
    moments = {size: np.full(size, AT_US) for size in SIZES}

    def read(keys: Any) -> Any:
        return reader.read([[keys]], moments[len(keys)])

    view = stored_view(features, VIEW)
    raw = _raw_redis(port) if port else _raw_lmdb(folder / "raw")
    put, get = raw
    for values in newest_rows(view, table, b"raw"):
        put(values)
    return read, get


def _raw_lmdb(folder: Path) -> tuple[Any, Any]:
    environment = lmdb.open(str(folder), map_size=1 << 30)

    def put(values: dict[bytes, bytes]) -> None:
        with environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(list(values.items()))

    def get(keys: list[bytes]) -> Any:
        with environment.begin() as transaction:
            return [transaction.get(key) for key in keys]

    return put, get


def _raw_redis(port: int) -> tuple[Any, Any]:
    client = redis.Redis(port=port)

    def put(values: dict[bytes, bytes]) -> None:
        items = list(values.items())
        for start in range(0, len(items), 5000):
            client.mset(dict(items[start : start + 5000]))

    return put, client.mget


def _check(ours: Any, feast: Worker, entities: int) -> None:
    asked = list(range(0, entities, max(1, entities // 100)))[:100]
    matrix, _ = ours(np.array(asked))
    assert matrix[:, 0].tolist() == feast("values", asked), "the stores disagree"


def _timed(read: Callable[[Any], Any], prepare: Callable[[Any], Any]) -> Read:
    def measure(asked: list[list[int]]) -> list[float]:
        taken = []
        for entities in asked:
            keys = prepare(np.array(entities, np.int64))
            began = time.perf_counter()
            read(keys)
            taken.append(time.perf_counter() - began)
        return taken

    return measure


def _measure(
    engines: dict[str, Any], entities: int, size: int, reads: int
) -> dict[str, list[float]]:
    random = np.random.default_rng(size)
    found: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(REPEATS + 1):
        asked = random.integers(0, entities, (reads, size)).tolist()
        for name, read in engines.items():
            # Feast takes milliseconds for a hundred: fewer reads are enough for its median.
            some = asked[: reads // 10] if name == "feast" else asked
            found[name].append(statistics.median(read(some)) * 1e6)
    return {name: medians[1:] for name, medians in found.items()}
