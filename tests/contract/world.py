"""One small declaration with features of every type, and how rows get into its stores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from mlops_ray.config.features import Features
from mlops_ray.features.columns import INSTANT
from mlops_ray.features.definitions import define
from mlops_ray.features.files import buckets_of
from mlops_ray.features.offline import OfflineStore

NAMES = ("price", "stock", "open", "note", "since")
KEYS = {
    "item": ("shop", "shelf"),
    "place": ("shop", "city"),
    "number": ("code",),
    "word": ("code",),
}
TTLS = {"item": None, "item_now": 0, "item_short": 10}
"""The TTL in µs of the views of items."""

_COLUMNS = {
    "price": "float",
    "stock": "int",
    "open": "bool",
    "note": "string",
    "since": "timestamp",
}


def declare(**changes: Any) -> Features:
    """The declaration: the view ``item`` and its like with TTLs, and views with other keys."""

    def view(entity: str, **more: Any) -> dict[str, Any]:
        return {
            "entity": entity,
            "source": "rows",
            "event_time": "event",
            "columns": _COLUMNS,
            **more,
        }

    content: dict[str, Any] = {
        "sources": {"rows": {"path": "rows.parquet", "available_at": "created"}},
        "entities": {
            "item": {"keys": {"shop": "string", "shelf": "int"}},
            "place": {"keys": {"shop": "string", "city": "string"}},
            "number": {"keys": {"code": "int"}},
            "word": {"keys": {"code": "string"}},
        },
        "views": {
            "item": view("item"),
            "item_now": view("item", ttl=0),
            "item_short": view("item", ttl=0.00001),
            "place": view("place"),
            "number": view("number"),
            "word": view("word"),
        },
        "services": {
            "all": {
                "views": ["item"],
                "inputs": {
                    "shop": {"dtype": "string", "nullable": True},
                    "shelf": {"dtype": "int", "nullable": True},
                    "at": {"dtype": "timestamp"},
                },
                "time": "at",
            }
        },
        "labels": {
            "source": "rows",
            "id": "id",
            "time": "at",
            "label": "label",
            "known_at": "known_at",
        },
        "offline": {"buckets": 4},
    }
    return Features.model_validate(content | changes)


def row(event: int, created: int | None = None, **more: Any) -> dict[str, Any]:
    """A row of the shelf (north, 1), unless said otherwise; known when it happens."""
    plain = {"shop": "north", "shelf": 1, "event": event, "created": created}
    plain["created"] = event if created is None else created
    filled = {"price": float(event), "stock": event, "open": True, "note": f"n{event}"}
    return plain | filled | {"since": event} | more


def label(at: int, **more: Any) -> dict[str, Any]:
    """A label of the shelf (north, 1), unless said otherwise."""
    return {"shop": "north", "shelf": 1, "at": at} | more


def table(features: Features, view: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of the view's schema."""
    schema = define(features, view).schema
    renamed = {"event_time": "event", "created_time": "created"}
    columns = {
        field.name: [item[renamed.get(field.name, field.name)] for item in rows] for field in schema
    }
    return pa.table({f.name: _array(columns[f.name], f.type) for f in schema}, schema=schema)


def label_table(labels: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Labels as a table, times in µs, with a column ``number``: their place."""
    keys = [name for name in labels[0] if name != "at"] if labels else ["shop", "shelf"]
    columns = {}
    for name in keys:
        values = [item[name] for item in labels]
        whole = name == "shelf" or any(type(value) is int for value in values)
        columns[name] = _array(values, pa.int64() if whole else pa.string())
    columns["at"] = _array([item["at"] for item in labels], INSTANT)
    return pa.table(columns | {"number": np.arange(len(labels))})


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_timestamp(kind):
        return pa.array(values, pa.int64()).cast(kind)
    return pa.array(values, kind, from_pandas=False)


def fill(
    store: OfflineStore,
    features: Features,
    view: str,
    rows: Sequence[Mapping[str, Any]],
    how: str = "one",
) -> None:
    """Store rows offline: in one commit, in several, as files of buckets, or compacted."""
    if how == "buckets":
        _fill_buckets(store, features, view, rows)
        return
    parts = [list(rows)] if how == "one" else _by_created(rows, 4)
    for part in parts:
        watermark = max((item["created"] for item in part), default=0)
        store.append(view, table(features, view, part), watermark)
    if how == "compacted" and rows:
        before = store.version(view)
        compact(store, view)
        assert store.version(view) > before


def compact(store: OfflineStore, view: str) -> None:
    """Compact, and cut the rows into buckets however few there are."""
    with patch("mlops_ray.features.compaction.TAIL_ROWS", 0):
        store.compact(view)


def _by_created(rows: Sequence[Mapping[str, Any]], most: int) -> list[list[Mapping[str, Any]]]:
    """Rows in ``most`` parts at the most, later ones created later, none empty."""
    moments = sorted({item["created"] for item in rows})
    parts: list[list[Mapping[str, Any]]] = [[] for _ in range(min(most, len(moments)))]
    place = {moment: n * len(parts) // len(moments) for n, moment in enumerate(moments)}
    for item in rows:
        parts[place[item["created"]]].append(item)
    return parts


def _fill_buckets(
    store: OfflineStore, features: Features, view: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    whole = table(features, view, rows)
    bucket = buckets_of(whole, list(define(features, view).keys), store.buckets(view))
    files = [
        store.write_bucket(view, int(number), whole.filter(pa.array(bucket == number)))
        for number in np.unique(bucket)
    ]
    store.commit(view, files, max((item["created"] for item in rows), default=0))


def plain(features: Features, columns: Mapping[str, pa.Array], view: str) -> list[dict[str, Any]]:
    """Joined columns as a dict for each label; they have the declared types. Timestamps in µs."""
    definition = define(features, view)
    lists = {}
    for name in definition.feature_names:
        values = columns[f"{view}__{name}"]
        assert values.type == definition.schema.field(name).type, (name, values.type)
        if pa.types.is_timestamp(values.type):
            values = values.cast(pa.int64())
        lists[name] = values.to_pylist()
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def equal(one: Any, other: Any) -> bool:
    """Equal values of equal types, bit for bit; NaN equals NaN, and never None."""
    if isinstance(one, float) and isinstance(other, float):
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return type(one) is type(other) and one == other


def assert_equal(found: Sequence[Mapping[str, Any]], due: Sequence[Mapping[str, Any]]) -> None:
    """Every value of every row is what it should be."""
    assert len(found) == len(due)
    for number, (ours, theirs) in enumerate(zip(found, due, strict=True)):
        wrong = {n: (ours[n], theirs[n]) for n in theirs if not equal(ours[n], theirs[n])}
        assert not wrong, f"row {number}: (found, due) = {wrong}"


def open_offline(folder: Path, features: Features) -> OfflineStore:
    """An offline store in a folder."""
    return OfflineStore(folder / "offline", features)
