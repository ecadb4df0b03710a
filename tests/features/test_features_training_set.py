from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mlops_ray.errors import FeatureStoreError, SchemaError
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.service import feature_columns
from mlops_ray.features.training_set import build_training_set, labelled_rows

pytestmark = pytest.mark.usefixtures("shop_project")


@pytest.fixture
def built(tmp_path: Path, shop: SimpleNamespace) -> SimpleNamespace:
    offline = OfflineStore(tmp_path / "offline", shop.features)
    online = open_online(shop.features, tmp_path / "online", "shop")
    pipeline = FeaturePipeline(shop.features, shop.tables, offline, online)
    for hour in range(6, 121, 6):
        pipeline.advance(shop.hour(hour))
    return SimpleNamespace(offline=offline, pipeline=pipeline, versions=pipeline.versions)


def build(shop: SimpleNamespace, built: SimpleNamespace, until=None, table=None):
    return build_training_set(
        shop.features,
        "buys",
        shop.tables["visits"] if table is None else table,
        built.offline,
        built.versions,
        until,
    )


def test_rows_and_columns(shop: SimpleNamespace, built: SimpleNamespace) -> None:
    table, count = build(shop, built)
    visits = shop.tables["visits"]
    assert count.labelled == table.num_rows == visits["bought"].drop_null().length()
    assert count.unlabelled == visits["bought"].null_count
    assert count.unknown == 0
    numeric, categorical = feature_columns(shop.features, "buys")
    assert table.column_names == [
        *("visit", "at", "label_known_at", "bought", "shop", "shelf", "weight"),
        *numeric,
        *categorical,
    ]
    types = {name: table.schema.field(name).type for name in numeric}
    counts = {name for name in numeric if "__visits_" in name}
    assert {name for name, kind in types.items() if kind == pa.int64()} == counts
    assert all(types[name] == pa.float64() for name in numeric if name not in counts)
    assert all(table.schema.field(name).type == pa.string() for name in categorical)
    assert table.schema.field("bought").type == pa.int8()
    order = list(zip(table["at"].to_pylist(), table["visit"].to_pylist(), strict=True))
    assert order == sorted(order)
    hours = [moment.hour for moment in table["at"].to_pylist()]
    assert table["hour"].to_pylist() == hours


def test_only_labels_known_by_then_count(shop: SimpleNamespace, built: SimpleNamespace) -> None:
    until = shop.hour(50)
    table, count = build(shop, built, until)
    everything, _ = build(shop, built)
    expected = everything.filter(pc.less_equal(everything["label_known_at"], pa.scalar(until)))
    assert table.equals(expected.combine_chunks())
    assert count.unknown == everything.num_rows - table.num_rows > 0


def test_no_feature_comes_from_after_its_prediction_time(
    shop: SimpleNamespace, built: SimpleNamespace
) -> None:
    """Rows that arrive after a prediction are changed beyond recognition: nothing moves."""
    moment = shop.hour(48)
    before, _ = build(shop, built)
    poisoned = {}
    for name, time, value in (("visits", "seen_at", "spent"), ("prices", "known_at", "price")):
        table = shop.tables[name]
        later = pc.greater(table[time], pa.scalar(moment))
        values = pc.if_else(later, pa.scalar(1e9), table[value])
        poisoned[name] = table.set_column(table.column_names.index(value), value, values)
    root = built.offline.path("price").parent.parent.parent / "poisoned"
    offline = OfflineStore(root / "offline", shop.features)
    online = open_online(shop.features, root / "online", "shop")
    pipeline = FeaturePipeline(shop.features, poisoned, offline, online)
    pipeline.advance(shop.hour(120))
    after, _ = build_training_set(
        shop.features, "buys", shop.tables["visits"], offline, pipeline.versions, None
    )
    early = pc.less_equal(before["at"], pa.scalar(moment))
    names = [n for n in before.column_names if "__" in n]
    assert before.filter(early).select(names).equals(after.filter(early).select(names))
    late = pc.invert(early)
    assert not before.filter(late).select(names).equals(after.filter(late).select(names))


def test_features_are_the_newest_row_known_at_the_time(
    shop: SimpleNamespace, built: SimpleNamespace
) -> None:
    table, _ = build(shop, built)
    prices = shop.tables["prices"].to_pylist()
    checked = 0
    for row in table.to_pylist():
        known = [
            (p["valid_from"], p["known_at"], place, p["price"])
            for place, p in enumerate(prices)
            if p["shop"] == row["shop"]
            and p["shelf"] == row["shelf"]
            and max(p["valid_from"], p["known_at"]) <= row["at"]
        ]
        newest = max(known, default=None)
        fresh = newest is not None and (row["at"] - newest[0]).total_seconds() <= 12 * 3600
        assert row["price__price"] == (newest[3] if newest and fresh else None)
        checked += fresh
    assert checked > 100


def test_the_same_bytes_again_after_the_store_has_moved_on(
    shop: SimpleNamespace, built: SimpleNamespace
) -> None:
    def bytes_of(table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    first = bytes_of(build(shop, built)[0])
    shop.tables["visits"] = pa.concat_tables([shop.tables["visits"], shop.visits(50, seed=9)])
    built.pipeline.advance(shop.hour(200))
    visits = shop.tables["visits"].slice(0, 600)
    shuffled = visits.take(np.random.default_rng(3).permutation(600))
    assert bytes_of(build(shop, built, table=visits)[0]) == first
    assert bytes_of(build(shop, built, table=shuffled)[0]) == first


def test_duplicate_labels_stay(shop: SimpleNamespace, built: SimpleNamespace) -> None:
    visits = shop.tables["visits"]
    single, _ = build(shop, built)
    double, _ = build(shop, built, table=pa.concat_tables([visits, visits]))
    assert double.num_rows == 2 * single.num_rows


def test_wrong_columns_are_named(shop: SimpleNamespace, built: SimpleNamespace) -> None:
    visits = shop.tables["visits"]
    with pytest.raises(SchemaError, match="no column 'bought'"):
        build(shop, built, table=visits.drop_columns(["bought"]))
    words = pa.array(["yes"] * visits.num_rows)
    place = visits.column_names.index("bought")
    with pytest.raises(SchemaError, match="'bought' has the wrong type"):
        build(shop, built, table=visits.set_column(place, "bought", words))
    with pytest.raises(SchemaError, match="no column 'weight'"):
        build(shop, built, table=visits.drop_columns(["weight"]))
    place = visits.column_names.index("shelf")
    texts = visits["shelf"].cast(pa.string())
    with pytest.raises(SchemaError, match="'shelf' has the wrong type: expected int"):
        build(shop, built, table=visits.set_column(place, "shelf", texts))


@pytest.mark.parametrize(
    ("function", "message"),
    [("too_short", "has shape"), ("leaves_out", "returned no feature 'shop_name'")],
)
def test_a_wrong_on_demand_function_is_named(
    shop: SimpleNamespace, built: SimpleNamespace, function: str, message: str
) -> None:
    moment = shop.features.on_demand["moment"]
    changed = moment.model_copy(update={"function": f"shop_project.{function}"})
    shop.features = shop.features.model_copy(update={"on_demand": {"moment": changed}})
    with pytest.raises(SchemaError, match=message):
        build(shop, built)


def test_a_service_that_is_not_there(shop: SimpleNamespace) -> None:
    with pytest.raises(FeatureStoreError, match="no feature service 'sells'"):
        feature_columns(shop.features, "sells")


def test_times_without_a_zone_are_utc(shop: SimpleNamespace) -> None:
    visits, until = shop.tables["visits"], shop.hour(50)
    naive = visits
    for name in ("at", "label_known_at"):
        place = visits.column_names.index(name)
        naive = naive.set_column(place, name, visits[name].cast(pa.timestamp("us")))
    rows, count = labelled_rows(naive, shop.features, until)
    expected, counted = labelled_rows(visits, shop.features, until)
    assert rows["visit"].to_pylist() == expected["visit"].to_pylist()
    assert count == counted
    assert count.unknown > 0
