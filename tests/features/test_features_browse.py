"""Looking at a store: lists, lineage, versions, freshness, statistics, leftovers."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import browse
from mlops_ray.features.columns import INSTANT, from_us
from mlops_ray.features.definitions import define
from mlops_ray.features.manifest import TrainingManifest, ViewPin, unpin, write_manifest
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.plan import record
from mlops_ray.features.pruning import prune
from mlops_ray.features.statistics import column_statistics, view_statistics

TYPED = {
    "entity": "shop",
    "source": "visits",
    "event_time": "seen_at",
    "columns": {
        "number": "float",
        "count": "int",
        "flag": "bool",
        "text": "string",
        "moment": "timestamp",
    },
    "freshness": "2h",
}


@pytest.fixture
def features(shop: SimpleNamespace) -> Features:
    views = {n: v.model_dump(mode="json") for n, v in shop.features.views.items()}
    return shop.declare(views=views | {"typed": TYPED})


def rows(features: Features, count: int, start: int = 0) -> pa.Table:
    random = np.random.default_rng(count)
    number = random.normal(size=count)
    number[::7] = np.nan
    moments = pa.array(np.arange(start, start + count) * 1_000_000, pa.int64()).cast(INSTANT)
    return pa.table(
        {
            "shop": random.choice(["a", "b", "c"], count),
            "event_time": moments,
            "created_time": moments,
            "number": pa.array(number, mask=random.random(count) < 0.2, from_pandas=False),
            "count": pa.array(random.integers(-5, 5, count), mask=random.random(count) < 0.1),
            "flag": pa.array(random.random(count) < 0.3),
            "text": pa.array(
                random.choice(["x", "y", "z"], count), mask=random.random(count) < 0.1
            ),
            "moment": moments,
        },
        schema=define(features, "typed").schema,
    )


@pytest.fixture
def store(tmp_path: Path, features: Features) -> OfflineStore:
    store = OfflineStore(tmp_path / "offline", features)
    store.append("typed", rows(features, 500), 500_000_000)
    store.append("typed", rows(features, 100, 1000), 1_100_000_000)
    return store


def test_overview_and_show(features: Features, store: OfflineStore) -> None:
    listed = {view.view: view for view in browse.overview(features, store)}
    assert set(listed) == set(features.views)
    assert listed["typed"].version == 1
    assert listed["typed"].complete_until == from_us(1_100_000_000)
    assert (listed["price"].version, listed["price"].complete_until) == (-1, None)
    shown = browse.show(features, store, "typed")
    assert shown["keys"] == {"shop": "string"}
    assert shown["features"] == TYPED["columns"]
    assert shown["table_id"] == store.table_id("typed")
    assert browse.show(features, store, "price")["services"] == ["buys"]
    with pytest.raises(FeatureStoreError, match="no feature view 'typo'"):
        browse.show(features, store, "typo")


def test_versions_tell_what_each_commit_added(features: Features, store: OfflineStore) -> None:
    found = browse.table_versions(features, store, "typed")
    assert [item.version for item in found] == [1, 0]
    assert [(item.added, item.replaced) for item in found] == [(100, False), (500, False)]
    assert all(abs(item.at - datetime.now(UTC)) < timedelta(minutes=5) for item in found)
    assert browse.table_versions(features, store, "price") == []
    store.compact("typed")
    store.append("typed", rows(features, 10), 2_000_000_000, "other code")
    replaced, compacted, *_ = browse.table_versions(features, store, "typed")
    assert (replaced.added, replaced.replaced) == (10, True)
    assert (compacted.added, compacted.replaced) == (0, False)
    assert len(browse.table_versions(features, store, "typed", limit=2)) == 2


def test_freshness_beside_its_target(features: Features, store: OfflineStore) -> None:
    newest = from_us(1_099_000_000)
    at_target = newest + timedelta(hours=2)
    found = {item.view: item for item in browse.freshness(features, store, at_target)}
    assert found["typed"].newest_event == found["typed"].newest_created == newest
    assert (found["typed"].age, found["typed"].stale) == (timedelta(hours=2), False)
    later = {i.view: i for i in browse.freshness(features, store, at_target + timedelta(seconds=1))}
    assert later["typed"].stale
    assert not found["price"].stale  # it has no target
    empty = OfflineStore(store.root / "nowhere", features)
    assert {i.view for i in browse.freshness(features, empty, newest) if i.stale} == {"typed"}


def test_lineage_reaches_sources_and_models(shop: SimpleNamespace) -> None:
    views = {n: v.model_dump(mode="json") for n, v in shop.features.views.items()}
    derived = {"entity": "shop", "view": "price", "columns": {"price": "float"}}
    features = shop.declare(views=views | {"derived": derived})
    edges = browse.edges(features, [("buys", "shop@3")])
    kind, found = browse.lineage(edges, "prices")
    assert kind == "source"
    assert {edge.made for edge in found} == {"price", "derived", "buys", "shop@3"}
    kind, found = browse.lineage(edges, "shop@3")
    assert kind == "model"
    assert {e.origin for e in found if e.origin_kind == "source"} == {"visits", "prices"}
    assert "derived" not in {edge.made for edge in found}
    kind, found = browse.lineage(edges, "moment")
    assert kind == "on-demand view"
    assert {(e.origin, e.made) for e in found} == {("moment", "buys"), ("buys", "shop@3")}
    kind, found = browse.lineage(edges, "derived")
    assert [(e.origin, e.made) for e in found if e.origin_kind == "view"] == [("price", "derived")]


def test_a_name_that_several_things_share(shop: SimpleNamespace) -> None:
    views = {"visits": shop.features.views["shop_visits"].model_dump(mode="json")}
    service = shop.features.services["buys"].model_dump(mode="json") | {"views": ["visits"]}
    edges = browse.edges(shop.declare(views=views, services={"buys": service}))
    with pytest.raises(FeatureStoreError, match="several things: source, view"):
        browse.lineage(edges, "visits")
    assert browse.lineage(edges, "view:visits")[0] == "view"
    assert browse.lineage(edges, "source:visits")[0] == "source"
    with pytest.raises(FeatureStoreError, match="nothing called 'zzz'") as error:
        browse.lineage(edges, "zzz")
    assert "buys" in error.value.fix


def test_statistics_agree_with_polars(features: Features, store: OfflineStore) -> None:
    found = view_statistics(features, store, "typed")
    frame = pl.from_arrow(store.read("typed"))
    assert isinstance(frame, pl.DataFrame)
    assert (found.version, found.rows, found.entities) == (1, 600, 3)
    assert (found.oldest_event, found.newest_event) == (from_us(0), from_us(1_099_000_000))
    by_name = {item.feature: item for item in found.features}
    assert list(by_name) == list(TYPED["columns"])
    number = frame["number"].drop_nulls().drop_nans()
    ours = by_name["number"]
    assert ours.nulls == frame["number"].null_count()
    assert ours.nans == frame["number"].is_nan().sum() > 10
    assert (ours.minimum, ours.maximum) == (number.min(), number.max())
    assert ours.mean == pytest.approx(number.mean())
    for share, value in zip((0.01, 0.25, 0.5, 0.75, 0.99), ours.quantiles, strict=True):
        assert value == pytest.approx(number.quantile(share, "linear"), abs=0.1)
    text = frame["text"].drop_nulls().value_counts(sort=True)
    assert by_name["text"].distinct == 3
    assert dict(by_name["text"].frequent) == dict(text.iter_rows())
    assert dict(by_name["flag"].frequent)["true"] == frame["flag"].sum()
    assert by_name["moment"].maximum == from_us(1_099_000_000).isoformat()
    older = view_statistics(features, store, "typed", version=0)
    assert (older.version, older.rows) == (0, 500)


@pytest.mark.parametrize("dtype", ["float", "int", "string", "bool", "timestamp"])
def test_statistics_of_nothing(dtype: Any, features: Features, tmp_path: Path) -> None:
    kinds = {"float": pa.float64(), "int": pa.int64(), "string": pa.string()}
    kind = kinds.get(dtype, pa.bool_() if dtype == "bool" else INSTANT)
    found = column_statistics("x", dtype, pa.chunked_array([pa.nulls(2, kind)]))
    assert (found.nulls, found.minimum, found.mean, found.quantiles) == (2, None, None, ())
    nothing = view_statistics(features, OfflineStore(tmp_path, features), "typed")
    assert (nothing.rows, nothing.entities, nothing.newest_event) == (0, 0, None)


def test_statistics_of_only_nan_and_of_large_integers() -> None:
    nan = column_statistics("x", "float", pa.chunked_array([[math.nan, math.nan]]))
    assert (nan.nans, nan.minimum) == (2, None)
    large = column_statistics("x", "int", pa.chunked_array([[2**53 + 1, 2**53 + 3]]))
    assert (large.minimum, large.maximum) == (2**53 + 1, 2**53 + 3)


def test_prune_removes_what_nothing_declares_or_pins(
    features: Features, store: OfflineStore, shop: SimpleNamespace
) -> None:
    record(features, store)
    raised = features.views["typed"].model_dump(mode="json") | {"version": 2}
    views = {n: v.model_dump(mode="json") for n, v in shop.features.views.items()}
    newer = shop.declare(views=views | {"typed": raised})
    after = OfflineStore(store.root, newer)
    # Until the new definition has a table, the old one is what is served.
    assert prune(newer, after, dry_run=False) == []
    after.append("typed", rows(newer, 10), 10_000_000)
    pin = ViewPin(
        definition=define(features, "typed").digest,
        table=store.table_id("typed"),
        version=0,
        generation="",
        ttl_us=None,
        features={},
    )
    manifest = TrainingManifest(
        service="buys", labels="0", views={"typed": pin}, until=None,
        known_only=True, on_demand="", rows=1, result="0",
    )  # fmt: skip
    write_manifest(store.root, manifest)
    (pinned,) = prune(newer, after, dry_run=False)
    assert pinned.fate == "pinned by a manifest"
    assert pinned.bytes > 1000
    assert store.read("typed", 0).num_rows == 500
    unpin(store.root, manifest.id)
    (listed,) = prune(newer, after, dry_run=True)
    assert listed.fate == "would be removed"
    assert store.version("typed") == 1
    (removed,) = prune(newer, after, dry_run=False)
    assert removed.fate == "removed"
    assert store.version("typed") == -1
    assert after.read("typed").num_rows == 10
    assert prune(newer, after, dry_run=False) == []


def test_prune_forgets_a_view_that_is_gone(
    features: Features, store: OfflineStore, shop: SimpleNamespace
) -> None:
    record(features, store)
    assert [i.view for i in prune(shop.features, store, dry_run=False)] == ["typed"]
    assert not (store.root / "typed").exists()
