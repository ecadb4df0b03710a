"""One run of one engine for the as-of join benchmark, in a process of its own.

``python -m benchmarks._asof_work ENGINE FOLDER TTL_HOURS`` prints one line of JSON. The clock runs from
the files on disk to the joined table in memory, in the labels' order; imports are outside.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset  # read_table would import it on the clock
import pyarrow.parquet as pq

from mlops_ray.config.features import Features
from mlops_ray.features.definitions import define
from mlops_ray.features.keys import key_hash
from mlops_ray.features.offline import OfflineStore

FEATURES = [f"f{number}" for number in range(10)]
YEAR_US = 365 * 24 * 3600 * 1_000_000
ROWS_PER_ENTITY = 50
LABELS, ROWS = "labels.parquet", "rows.parquet"


def declare(ttl_hours: int) -> Features:
    return Features.model_validate(
        {
            "sources": {"facts": {"path": ROWS, "available_at": "created_time"}},
            "entities": {"customer": {"keys": {"customer": "int"}}},
            "views": {
                "facts": {
                    "entity": "customer",
                    "source": "facts",
                    "event_time": "event_time",
                    "columns": FEATURES,
                    "ttl": f"{ttl_hours}h",
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
        }
    )


def prepare(folder: Path, labels: int, rows: int, peers: bool) -> None:
    """Write the labels, our store bucket by bucket, and for the peers one file sorted by time."""
    random = np.random.default_rng(0)
    entities = rows // ROWS_PER_ENTITY
    asked = {
        "customer": pa.array(random.integers(0, entities, labels)),
        "at": instants(random.integers(0, YEAR_US, labels)),
    }
    pq.write_table(pa.table(asked), folder / LABELS)
    store = OfflineStore(folder / "store", declare(1))
    customers = np.arange(entities)
    home = key_hash([pa.array(customers)]) % np.uint64(store.buckets("facts"))
    written, parts = [], []
    for bucket in range(store.buckets("facts")):
        part = facts(random, np.repeat(customers[home == bucket], ROWS_PER_ENTITY))
        written.append(store.write_bucket("facts", bucket, part))
        if peers:
            parts.append(part)
    store.commit("facts", written, YEAR_US)
    if peers:
        everything = pa.concat_tables(parts).sort_by("event_time")
        pq.write_table(everything, folder / ROWS)


def facts(random: np.random.Generator, customer: Any) -> pa.Table:
    event_us = random.integers(0, YEAR_US, len(customer))
    columns = [customer, event_us, event_us, *(random.normal(size=len(customer)) for _ in FEATURES)]
    schema = define(declare(1), "facts").schema
    values = [pa.array(c).cast(f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.table(values, schema=schema)


def instants(us: Any) -> pa.Array:
    return pa.array(us).cast(pa.timestamp("us", "UTC"))


def ours(folder: Path, ttl_hours: int) -> Callable[[], pa.Table]:
    from mlops_ray.features.join import join_view

    features = declare(ttl_hours)

    def run() -> pa.Table:
        labels = pq.read_table(folder / LABELS)
        store = OfflineStore(folder / "store", features)
        joined = join_view(features, "facts", labels, "at", store)
        return pa.table(
            {name: labels[name] for name in labels.column_names}
            | {name: joined[f"facts__{name}"] for name in FEATURES}
        )

    return run


def polars(folder: Path, ttl_hours: int, engine: Any = "in-memory") -> Callable[[], pa.Table]:
    import polars as pl

    def run() -> pa.Table:
        left = pl.scan_parquet(folder / LABELS).with_row_index("i").sort("at")
        right = pl.scan_parquet(folder / ROWS).select("customer", "event_time", *FEATURES)
        joined = left.join_asof(
            right.set_sorted("event_time"),
            left_on="at",
            right_on="event_time",
            by="customer",
            tolerance=f"{ttl_hours}h",
            check_sortedness=False,
        )
        columns = ["customer", "at", *FEATURES]
        return joined.sort("i").select(columns).collect(engine=engine).to_arrow()

    return run


def polars_streaming(folder: Path, ttl_hours: int) -> Callable[[], pa.Table]:
    return polars(folder, ttl_hours, "streaming")


def duckdb(folder: Path, ttl_hours: int) -> Callable[[], pa.Table]:
    import duckdb as peer

    chosen = ", ".join(
        f"case when l.at - r.event_time <= interval {ttl_hours} hours then r.{name} end as {name}"
        for name in FEATURES
    )

    def run() -> pa.Table:
        return (
            peer.connect()
            .sql(
                f"with l as (select *, file_row_number as i from read_parquet('{folder / LABELS}', "
                f"file_row_number = true)) select l.customer, l.at, {chosen} from l asof left join "
                f"'{folder / ROWS}' r on l.customer = r.customer and l.at >= r.event_time order by l.i"
            )
            .to_arrow_table()
        )

    return run


ENGINES = {
    "ours": ours,
    "polars": polars,
    "polars_streaming": polars_streaming,
    "duckdb": duckdb,
}


def digest(table: pa.Table) -> str:
    """A digest of the joined features; null and NaN are the same."""
    state = hashlib.blake2b(digest_size=16)
    for name in ["customer", *FEATURES]:
        values = table[name].cast(pa.float64()).fill_null(np.nan).to_numpy()
        state.update(np.ascontiguousarray(values).data)
    return state.hexdigest()


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    engine, folder, ttl_hours = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if engine == "prepare":
        labels, rows, peers = (int(given) for given in sys.argv[4:])
        prepare(folder, labels, rows, bool(peers))
        return
    run = ENGINES[engine](folder, ttl_hours)
    began = time.perf_counter()
    table = run()
    seconds = time.perf_counter() - began
    peak = peak_mib()
    found = table.num_rows - table[FEATURES[0]].null_count
    print(json.dumps({"s": seconds, "mib": peak, "found": found, "digest": digest(table)}))


if __name__ == "__main__":
    main()
