"""Feast at the work of the as-of join benchmark; runs in Feast's environment.

``FOLDER TTL_HOURS ROWS LABELS`` prints one line: seconds from files to the joined frame in memory, by
its DuckDB offline store, the peak memory of the process, and how many labels found a row.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.repo_config import RegistryConfig, RepoConfig
from feast.types import Float64

FEATURES = [f"f{number}" for number in range(10)]


def open_store(folder: Path, ttl_hours: int, rows: Path) -> FeatureStore:
    store = FeatureStore(
        config=RepoConfig(
            project="bench",
            provider="local",
            registry=RegistryConfig(path=str(folder / f"registry-{ttl_hours}.db")),
            offline_store={"type": "duckdb"},
            online_store={"type": "sqlite", "path": str(folder / "online.db")},
            entity_key_serialization_version=3,
        )
    )
    customer = Entity(name="customer", join_keys=["customer"], value_type=ValueType.INT64)
    source = FileSource(
        path=str(rows), timestamp_field="event_time", created_timestamp_column="created_time"
    )
    view = FeatureView(
        name="facts",
        entities=[customer],
        ttl=timedelta(hours=ttl_hours),
        schema=[Field(name=name, dtype=Float64) for name in FEATURES],
        source=source,
    )
    store.apply([customer, view])
    return store


def main() -> None:
    folder, ttl_hours = Path(sys.argv[1]), int(sys.argv[2])
    store = open_store(folder, ttl_hours, Path(sys.argv[3]))
    began = time.perf_counter()
    labels = pd.read_parquet(sys.argv[4]).rename(columns={"at": "event_timestamp"})
    joined = store.get_historical_features(
        entity_df=labels, features=[f"facts:{name}" for name in FEATURES]
    ).to_df()
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    found = int(joined[FEATURES[0]].notna().sum())
    print(json.dumps({"s": seconds, "mib": int(line.split()[1]) / 1024, "found": found}))


if __name__ == "__main__":
    main()
