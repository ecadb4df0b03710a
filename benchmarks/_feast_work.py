"""Feast at the work of the online benchmarks; runs in Feast's environment.

Started with the kind of the online store, a folder, the Redis server's port and a Parquet file. Each
line of stdin is a request: ["materialize"] fills the online store and answers its seconds; ["read",
[[id, …], …]] looks up the features of each list of entities and answers the seconds of each;
["values", [id, …]] answers the first feature of each.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.repo_config import RegistryConfig, RepoConfig
from feast.types import Float64

FEATURES = [f"f{number}" for number in range(10)]


def open_store(kind: str, folder: Path, port: str, data: str) -> FeatureStore:
    folder.mkdir(parents=True, exist_ok=True)
    online = {
        "sqlite": {"type": "sqlite", "path": str(folder / "online.db")},
        "redis": {"type": "redis", "connection_string": f"127.0.0.1:{port}"},
    }[kind]
    store = FeatureStore(
        config=RepoConfig(
            project="bench",
            provider="local",
            registry=RegistryConfig(path=str(folder / "registry.db"), cache_ttl_seconds=3600),
            online_store=online,
            offline_store={"type": "file"},
            entity_key_serialization_version=3,
        )
    )
    customer = Entity(name="customer", join_keys=["customer"], value_type=ValueType.INT64)
    source = FileSource(
        path=data, timestamp_field="event_time", created_timestamp_column="created_time"
    )
    view = FeatureView(
        name="facts",
        entities=[customer],
        ttl=timedelta(days=3650),
        schema=[Field(name=name, dtype=Float64) for name in FEATURES],
        source=source,
    )
    store.apply([customer, view])
    return store


def materialize(store: FeatureStore) -> float:
    began = time.perf_counter()
    store.materialize(datetime(2023, 12, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC))
    return time.perf_counter() - began


def read(store: FeatureStore, asked: list[list[int]]) -> list[float]:
    names = [f"facts:{name}" for name in FEATURES]
    taken = []
    for customers in asked:
        rows = [{"customer": customer} for customer in customers]
        began = time.perf_counter()
        store.get_online_features(features=names, entity_rows=rows).to_dict()
        taken.append(time.perf_counter() - began)
    return taken


def values(store: FeatureStore, customers: list[int]) -> list[float]:
    rows = [{"customer": customer} for customer in customers]
    found: list[float] = store.get_online_features(
        features=["facts:f0"], entity_rows=rows
    ).to_dict()["f0"]
    return found


def main() -> None:
    kind, folder, port, data = sys.argv[1:]
    store = open_store(kind, Path(folder), port, data)
    work: dict[str, Any] = {"materialize": materialize, "read": read, "values": values}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer = work[name](store, *arguments)
        print("answer", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
