"""Training manifests: the same training set, bit for bit, whatever the store went through since."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import join, reproduction
from mlops_ray.features.columns import to_us
from mlops_ray.features.definitions import define
from mlops_ray.features.manifest import list_manifests, pinning, read_manifest, unpin
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.reproduction import digest_table, make_training_set, training_set_of
from mlops_ray.features.training_set import build_training_set, join_service
from mlops_ray.metadata.types import FeatureVersions

pytestmark = pytest.mark.usefixtures("shop_project")


def rows_of(features: Features, view: str, count: int, start: int, hours: int) -> pa.Table:
    """Random rows of a view, created in the ``hours`` after hour ``start``."""
    random = np.random.default_rng([count, start])
    definition = define(features, view)
    first = to_us(datetime(2024, 3, 1, tzinfo=UTC))
    created = first + (start + random.random(count) * hours) * 3.6e9
    columns: dict[str, Any] = {
        "shop": random.choice(["north", "süd", "ost", "west"], count),
        "shelf": random.integers(1, 4, count),
        "created_time": created.astype(np.int64),
        "event_time": (created - random.random(count) * 7.2e9).astype(np.int64),
    }
    schema = definition.schema
    values = [
        pa.array(columns.get(field.name, random.integers(0, 99, count))).cast(field.type)
        for field in schema
    ]
    return pa.table(values, schema=schema)


@pytest.fixture
def store(tmp_path: Path, shop: SimpleNamespace) -> OfflineStore:
    store = OfflineStore(tmp_path / "offline", shop.features)
    for hour in range(0, 60, 12):
        advance(store, shop, hour)
    return store


def advance(store: OfflineStore, shop: SimpleNamespace, hour: int, count: int = 60) -> None:
    for view in shop.features.views:
        rows = rows_of(shop.features, view, count, hour, 12)
        store.append(view, rows, to_us(shop.hour(hour + 12)), "code")


def versions_of(store: OfflineStore, shop: SimpleNamespace) -> FeatureVersions:
    views = shop.features.views
    return FeatureVersions(
        versions={view: store.version(view) for view in views},
        tables={view: store.table_id(view) for view in views},
    )


def bytes_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_the_same_bytes_after_appends_compaction_and_vacuum(
    ray_cluster: Any,
    shop: SimpleNamespace,
    store: OfflineStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visits, until = shop.tables["visits"], shop.hour(70)
    made = make_training_set(shop.features, "buys", visits, store, versions_of(store, shop), until)
    plain, count = build_training_set(
        shop.features, "buys", visits, store, versions_of(store, shop).versions, until
    )
    assert (made.table, made.count) == (plain, count)
    assert made.table["price__price"].null_count < made.table.num_rows
    first = bytes_of(made.table)
    [(name, manifest)] = list_manifests(store.root).items()
    assert manifest == made.manifest == read_manifest(store.root, name)
    assert manifest.rows == made.table.num_rows > 100
    monkeypatch.setattr("mlops_ray.features.compaction.TAIL_ROWS", 50)
    for hour in range(60, 120, 12):
        advance(store, shop, hour)
        for view in shop.features.views:
            store.compact(view)
            store.vacuum(view, retention=timedelta(0))
    other = OfflineStore(store.root, shop.features)
    more = pa.concat_tables([visits, shop.visits(50, seed=9).filter(pa.array([False] * 50))])
    for cores, job_labels, on_ray in ((1, 10**6, False), (3, 40, False), (1, 10**6, True)):
        monkeypatch.setattr(join, "_cores", lambda count=cores: count)
        monkeypatch.setattr(join, "_JOB_LABELS", job_labels)
        again = training_set_of(manifest, shop.features, more, other, on_ray=on_ray)
        assert bytes_of(again) == first
    newest = make_training_set(
        shop.features, "buys", visits, store, versions_of(store, shop), until
    )
    assert newest.manifest.result != manifest.result
    assert list(list_manifests(store.root)) == [name, newest.manifest.id]


def test_labels_that_became_known_later_do_not_matter(
    shop: SimpleNamespace, store: OfflineStore
) -> None:
    visits = shop.tables["visits"]
    made = make_training_set(
        shop.features, "buys", visits, store, versions_of(store, shop), shop.hour(40)
    )
    later = shop.visits(80, seed=4)
    place = later.column_names.index("label_known_at")
    late = pa.array([shop.hour(41)] * 80, later.schema.field(place).type)
    more = pa.concat_tables([later.set_column(place, "label_known_at", late), visits])
    again = training_set_of(made.manifest, shop.features, more, store)
    assert again.equals(made.table)


def test_what_is_not_as_it_was_is_named(shop: SimpleNamespace, store: OfflineStore) -> None:
    visits, until = shop.tables["visits"], shop.hour(70)
    versions = versions_of(store, shop)
    made = make_training_set(shop.features, "buys", visits, store, versions, until)

    def refused(what: str, features: Features = shop.features, table: pa.Table = visits) -> None:
        other = OfflineStore(store.root, features)
        with pytest.raises(FeatureStoreError, match=f"{what} is not what it was") as caught:
            training_set_of(made.manifest, features, table, other)
        assert caught.value.why.startswith("then ")

    content = shop.features.model_dump(mode="json")
    content["views"]["price"]["version"] = 2
    refused("the definition of view 'price'", Features.model_validate(content))
    content = shop.features.model_dump(mode="json")
    content["offline"]["known_only"] = False
    refused("offline.known_only", Features.model_validate(content))
    content = shop.features.model_dump(mode="json")
    content["views"]["price"]["ttl"] = "6h"
    refused("the TTL of view 'price' in µs", Features.model_validate(content))
    content = shop.features.model_dump(mode="json")
    content["views"]["price"]["columns"] = {"price": "float"}
    refused("the features of view 'price'", Features.model_validate(content))
    content = shop.features.model_dump(mode="json")
    content["services"]["buys"]["views"] = ["price", "shop_visits"]
    refused("the service's list of views", Features.model_validate(content))
    weight = visits.column_names.index("weight")
    changed = visits.set_column(weight, "weight", pa.nulls(visits.num_rows, pa.float64()))
    refused("the labels", table=changed)
    module = Path(shop_module())
    module.write_text(module.read_text() + "\nNEW = 1\n")
    training_set_of(made.manifest, shop.features, visits, store)
    module.write_text(module.read_text().replace("% 24", "% 12"))
    refused("the code of on-demand views")


def shop_module() -> str:
    import importlib

    return str(importlib.import_module("shop_project").__file__)


def test_versions_of_another_table_are_refused(shop: SimpleNamespace, store: OfflineStore) -> None:
    versions = versions_of(store, shop)
    other = versions.model_copy(update={"tables": versions.tables | {"price": "another"}})
    with pytest.raises(FeatureStoreError, match="the table of view 'price'"):
        make_training_set(shop.features, "buys", shop.tables["visits"], store, other, None)
    assert list_manifests(store.root) == {}


def test_a_manifest_can_be_forgotten(shop: SimpleNamespace, store: OfflineStore) -> None:
    made = make_training_set(
        shop.features, "buys", shop.tables["visits"], store, versions_of(store, shop), None
    )
    unpin(store.root, made.manifest.id)
    assert list_manifests(store.root) == {}
    with pytest.raises(FeatureStoreError, match="no training manifest"):
        unpin(store.root, made.manifest.id)


def test_the_digest_of_a_table_is_that_of_its_values() -> None:
    table = pa.table(
        {
            "text": ["a", None, "ßc", ""],
            "n": [1, None, 3, 4],
            "x": [0.0, float("nan"), None, -0.0],
            "yes": [True, None, False, True],
            "at": pa.array([1, None, 3, 4]).cast(pa.timestamp("us", "UTC")),
        }
    )
    digest = digest_table(table)
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1, 2), table.slice(3)])
    assert digest_table(pieces) == digest == digest_table(pa.concat_tables([table])[0:4])
    others = [table.slice(0, 3), table.rename_columns(["b", *table.column_names[1:]])]
    others.append(table.set_column(0, "text", pa.array(["a", None, "ß", "c"])))
    others.append(table.set_column(0, "text", pa.array(["a", "", "ßc", None])))
    others.append(table.set_column(1, "n", pa.array([1.0, None, 3.0, 4.0])))
    others.append(table.set_column(2, "x", pa.array([0.0, None, None, -0.0])))
    others.append(table.set_column(2, "x", pa.array([0.0, float("nan"), None, 0.0])))
    assert len({digest, *map(digest_table, others)}) == 8


def test_a_vacuum_beside_the_join_leaves_no_broken_manifest(
    shop: SimpleNamespace, store: OfflineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = versions_of(store, shop)
    store.compact("price")

    def join_then_vacuum(*args: Any, **options: Any) -> pa.Table:
        table = join_service(*args, **options)
        assert OfflineStore(store.root, shop.features).vacuum("price", retention=timedelta(0))
        return table

    monkeypatch.setattr(reproduction, "join_service", join_then_vacuum)
    with pytest.raises(FeatureStoreError, match="not there any more"):
        make_training_set(shop.features, "buys", shop.tables["visits"], store, versions, None)
    assert list_manifests(store.root) == {}


def test_vacuum_waits_while_a_manifest_is_written(
    shop: SimpleNamespace, store: OfflineStore
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with pinning(store.root):
            waiting = pool.submit(store.vacuum, "price", retention=timedelta(0))
            with pytest.raises(TimeoutError):
                waiting.result(0.3)
        assert waiting.result() == []


def test_a_manifest_that_vanishes_meanwhile_is_not_listed(
    shop: SimpleNamespace, store: OfflineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_training_set(
        shop.features, "buys", shop.tables["visits"], store, versions_of(store, shop), None
    )
    folder = store.root / "manifests"
    monkeypatch.setattr(Path, "glob", lambda *_: [folder / "gone.json", folder / f"{name}.json"])
    name = made.manifest.id
    assert list(list_manifests(store.root)) == [name]


def test_an_unknown_manifest_is_told_though_another_is_broken(store: OfflineStore) -> None:
    folder = store.root / "manifests"
    folder.mkdir()
    (folder / "broken.json").write_text("{")
    with pytest.raises(FeatureStoreError, match="no training manifest 'other'") as caught:
        read_manifest(store.root, "other")
    assert "broken" in (caught.value.fix or "")
