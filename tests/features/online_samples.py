"""A view with a feature of every type, and an online store of each kind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from redis_server import RedisServer, serve

from mlops_ray.config.features import Features
from mlops_ray.features.definitions import define
from mlops_ray.features.online import OnlineStore, open_online

HOUR_US = 3_600_000_000
TYPED = {
    "price": "float",
    "stock": "int",
    "note": "string",
    "open": "bool",
    "seen": "timestamp",
    "colour": "string",
}
VALUES = {"price": 1.5, "stock": 7, "note": "süß", "open": True, "seen": -5, "colour": "red"}


def declare(columns: Any = TYPED, ttl: str | None = "12h", **online: Any) -> Features:
    """``thing`` has two keys and ``columns``; ``plain`` has one key and floats; ``name`` text."""
    views = {
        "thing": {"entity": "shelf", "columns": columns, **({"ttl": ttl} if ttl else {})},
        "plain": {"entity": "shelf_alone", "columns": ["a", "b"]},
        "name": {"entity": "shop", "columns": {"word": "string"}, "ttl": "0s"},
    }
    return Features.model_validate(
        {
            "sources": {"rows": {"path": "rows.parquet", "available_at": "at"}},
            "entities": {
                "shelf": {"keys": {"shop": "string", "shelf": "int"}},
                "shelf_alone": {"keys": {"shelf": "int"}},
                "shop": {"keys": {"shop": "string"}},
            },
            "views": {
                name: {"source": "rows", "event_time": "at", **view} for name, view in views.items()
            },
            "services": {},
            "labels": {
                "source": "rows",
                "id": "id",
                "time": "at",
                "label": "label",
                "known_at": "known_at",
            },
            "online": online,
        }
    )


def table(features: Features, view: str, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows of a view; times are whole µs."""
    schema = define(features, view).schema
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if pa.types.is_timestamp(field.type):
            columns.append(pa.array(values, pa.int64()).cast(field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=schema)


def row(event: int, created: int | None = None, key: Any = ("north", 1), **values: Any) -> Any:
    """One row of ``thing``."""
    times = {"event_time": event, "created_time": event if created is None else created}
    return {"shop": key[0], "shelf": key[1], **times, **(values or VALUES)}


def keys(*pairs: tuple[str | None, int]) -> list[np.ndarray]:
    return [np.array([p[0] for p in pairs], object), np.array([p[1] for p in pairs], np.int64)]


def get(store: OnlineStore, at: int, key: Any = ("north", 1)) -> tuple[dict[str, Any], list[int]]:
    """Values and statuses of all features of one thing; timestamps in µs."""
    found, statuses = store.reader(["thing"]).read_table([keys(key)], np.array([at]))
    values = {}
    for name, column in zip(found.column_names, found.columns, strict=True):
        whole = column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
        values[name.removeprefix("thing__")] = whole[0].as_py()
    return values, statuses[0].tolist()


def put(store: OnlineStore, features: Features, *rows: dict[str, Any]) -> int:
    return store.write("thing", table(features, "thing", rows))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for the whole session; tests have projects of their own."""
    yield from serve(tmp_path_factory.mktemp("redis"))


def settings(request: pytest.FixtureRequest, kind: str) -> dict[str, Any]:
    if kind == "lmdb":
        return {}
    return {"store": "redis", "url": request.getfixturevalue("redis_server").url}


class Opener:
    """Opens an online store for declarations; the same ``name`` is the same store."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._project = f"test-{time.time_ns()}"

    def arguments(self, features: Features, name: str = "one") -> tuple[Features, Path, str]:
        """What ``open_online`` is called with."""
        online = type(features.online).model_validate(self._settings)
        declared = features.model_copy(update={"online": online})
        return declared, self._folder / name, f"{self._project}-{name}"

    def __call__(
        self, features: Features, name: str = "one", readonly: bool = False
    ) -> OnlineStore:
        return open_online(*self.arguments(features, name), readonly)


@pytest.fixture(params=["lmdb", "redis"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Online stores of each kind."""
    return Opener(settings(request, request.param), tmp_path / "online")
