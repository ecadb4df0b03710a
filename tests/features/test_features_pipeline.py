"""The pipeline: incremental is backfill, online is offline, nothing lost and nothing doubled."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_ray.errors import FeatureStoreError, SchemaError
from mlops_ray.features.columns import to_us
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.training_set import join_view

VIEWS = ("price", "shop_visits", "shelf_visits", "again", "by_shop")
MORE = {
    # Views of views: one row for each of theirs, and windows over theirs.
    "again": {
        "entity": "shelf",
        "view": "price",
        "columns": {"price": "float", "stock": "int"},
        "ttl": "12h",
    },
    "by_shop": {
        "entity": "shop",
        "view": "shelf_visits",
        "every": "2h",
        "windows": ["4h", "12h"],
        "aggregates": {
            "rows": {"by": "count"},
            "most": {"by": "max", "of": "mean_spent_6h"},
            "shelves": {"by": "approx_distinct", "of": "shelf"},
        },
    },
}


@pytest.fixture
def shop(shop: SimpleNamespace) -> SimpleNamespace:
    """The shop with views of views, one of them declared before its origin."""
    views = shop.features.model_dump(mode="json", exclude_unset=True)["views"]
    price = views["price"] | {"columns": {"price": "float", "stock": "int"}}
    shop.features = shop.declare(views=MORE | views | {"price": price})
    return shop


def open_pipeline(root: Path, shop: SimpleNamespace, **options) -> FeaturePipeline:
    return FeaturePipeline(
        shop.features,
        shop.tables,
        OfflineStore(root / "offline", shop.features),
        open_online(shop.features, root / "online", "shop"),
        **options,
    )


def stored(root: Path, shop: SimpleNamespace) -> dict[str, pa.Table]:
    """All offline rows in one fixed order."""
    store = OfflineStore(root / "offline", shop.features)
    tables = {}
    for view in VIEWS:
        table = store.read(view)
        keys = [name for name in table.column_names if name in ("shop", "shelf")]
        order = [(name, "ascending") for name in ("created_time", "event_time", *keys)]
        tables[view] = table.sort_by(order).combine_chunks()
    return tables


def same_bits(first: dict[str, pa.Table], second: dict[str, pa.Table]) -> bool:
    def bits(table: pa.Table) -> list:
        columns = []
        for field, column in zip(table.schema, table.columns, strict=True):
            if pa.types.is_floating(field.type):
                columns.append(column.is_null().to_pylist())
                column = pa.array(column.fill_null(0.0).to_numpy().view(np.int64))
            columns.append(column.to_pylist())
        return columns

    return all(bits(first[view]) == bits(second[view]) for view in VIEWS)


@pytest.fixture(scope="module")
def backfilled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """The offline rows of one advance over everything."""
    cache: dict[str, dict[str, pa.Table]] = {}

    def build(shop: SimpleNamespace) -> dict[str, pa.Table]:
        if not cache:
            root = tmp_path_factory.mktemp("backfill")
            open_pipeline(root, shop).advance(shop.hour(120))
            cache["rows"] = stored(root, shop)
        return cache["rows"]

    return build


def test_backfill_writes_every_view(shop: SimpleNamespace, backfilled) -> None:
    rows = backfilled(shop)
    assert all(rows[view].num_rows > 50 for view in VIEWS)
    assert rows["shop_visits"]["shop"].null_count == 0
    assert set(rows["shop_visits"]["shop"].to_pylist()) == {"north", "süd", "ost", "west"}
    for view in VIEWS:
        created = rows[view]["created_time"].cast(pa.int64()).to_numpy()
        assert (created >= rows[view]["event_time"].cast(pa.int64()).to_numpy()).all()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.floats(-3, 120), st.sampled_from(["commit", "keep", "crash"])), max_size=12
    )
)
def test_any_way_of_advancing_and_crashing_gives_the_bits_of_the_backfill(
    tmp_path_factory: pytest.TempPathFactory, shop: SimpleNamespace, backfilled, stops: list
) -> None:
    root = tmp_path_factory.mktemp("incremental")
    pipeline = open_pipeline(root, shop)
    for hour, then in sorted(stops):
        pipeline.advance(shop.hour(hour), commit=then == "commit")
        if then == "crash":
            pipeline = open_pipeline(root, shop)
    pipeline.advance(shop.hour(120))
    assert same_bits(stored(root, shop), backfilled(shop))


def test_rows_that_were_not_committed_are_computed_again(
    tmp_path: Path, shop: SimpleNamespace
) -> None:
    first = open_pipeline(tmp_path, shop)
    first.advance(shop.hour(40))
    committed = stored(tmp_path, shop)
    lost = first.advance(shop.hour(60), commit=False)
    assert lost > 0
    assert same_bits(stored(tmp_path, shop), committed)
    second = open_pipeline(tmp_path, shop)
    assert second.advance(shop.hour(60)) == lost
    after = stored(tmp_path, shop)
    assert sum(t.num_rows for t in after.values()) == lost + sum(
        t.num_rows for t in committed.values()
    )


def test_two_pipelines_over_one_store_write_each_row_once(
    tmp_path: Path, shop: SimpleNamespace, backfilled
) -> None:
    first, second = open_pipeline(tmp_path, shop), open_pipeline(tmp_path, shop)
    first.advance(shop.hour(30), commit=False)
    second.advance(shop.hour(50))
    first.commit()
    first.advance(shop.hour(90))
    second.advance(shop.hour(120))
    assert same_bits(stored(tmp_path, shop), backfilled(shop))


def test_advancing_to_the_same_moment_again_changes_nothing(
    tmp_path: Path, shop: SimpleNamespace
) -> None:
    pipeline = open_pipeline(tmp_path, shop)
    pipeline.advance(shop.hour(50))
    versions = pipeline.versions
    assert pipeline.advance(shop.hour(50)) == 0
    assert pipeline.advance(shop.hour(20)) == 0
    assert pipeline.versions == versions
    again = open_pipeline(tmp_path, shop)
    assert again.versions == versions
    assert again.advance(shop.hour(50)) == 0


def test_a_boundary_is_emitted_only_once_it_is_reached(
    tmp_path: Path, shop: SimpleNamespace
) -> None:
    seen = pa.array([shop.hour(0.5), shop.hour(0.9)])
    table = shop.visits(2)
    for name in ("seen_at", "entered_at", "at"):
        table = table.set_column(
            table.column_names.index(name), name, seen.cast(pa.timestamp("us", "UTC"))
        )
    table = table.set_column(table.column_names.index("shop"), "shop", pa.array(["north", "north"]))
    shop.tables["visits"] = table
    pipeline = open_pipeline(tmp_path, shop)
    pipeline.advance(shop.hour(0.99))
    assert stored(tmp_path, shop)["shop_visits"].num_rows == 0
    pipeline.advance(shop.hour(1))
    row = stored(tmp_path, shop)["shop_visits"].to_pylist()
    assert [r["event_time"] for r in row] == [shop.hour(1)]
    assert row[0]["visits_3h"] == 2


def test_online_is_offline_at_every_instant(tmp_path: Path, shop: SimpleNamespace) -> None:
    pipeline = open_pipeline(tmp_path, shop)
    online = open_online(shop.features, tmp_path / "online", "shop", readonly=True)
    offline = OfflineStore(tmp_path / "offline", shop.features)
    asked = pa.table(
        {
            "shop": ["north", "süd", "ost", "west", "nowhere", None] * 3,
            "shelf": pa.array(np.repeat([1, 2, 9], 6)),
        }
    )
    shops, shelves = np.array(asked["shop"].to_pylist(), object), asked["shelf"].to_numpy()
    keys = {view: [shops, shelves] for view in ("price", "shelf_visits", "again")}
    keys |= {view: [shops] for view in ("shop_visits", "by_shop")}
    found = 0
    for hour in (2, 7.5, 13, 29, 61, 100, 140):
        pipeline.advance(shop.hour(hour))
        moments = np.full(len(shops), to_us(shop.hour(hour)))
        now = pa.array(moments).cast(pa.timestamp("us", tz="UTC"))
        for view in VIEWS:
            matrix, status = online.read_matrix(view, keys[view], moments)
            columns = join_view(
                shop.features, view, asked.append_column("now", now), "now", offline
            )
            theirs = np.column_stack([c.to_numpy(zero_copy_only=False) for c in columns.values()])
            np.testing.assert_array_equal(matrix, theirs.astype(float))
            nulls = np.column_stack([c.is_null().to_numpy(False) for c in columns.values()])
            np.testing.assert_array_equal(status != 0, nulls)
            found += int((status == 0).sum())
    assert found > 300


def test_a_lost_online_store_is_filled_from_the_offline_one(
    tmp_path: Path, shop: SimpleNamespace
) -> None:
    open_pipeline(tmp_path, shop).advance(shop.hour(70))
    shutil.copytree(tmp_path / "offline", tmp_path / "copy" / "offline")
    open_pipeline(tmp_path / "copy", shop)
    moments = np.full(4, to_us(shop.hour(70)))
    keys = [np.array(["north", "süd", "ost", "west"], object)]
    ours = open_online(shop.features, tmp_path / "online", "shop").read_matrix(
        "shop_visits", keys, moments
    )
    copy = open_online(shop.features, tmp_path / "copy" / "online", "shop")
    theirs = copy.read_matrix("shop_visits", keys, moments)
    assert (ours[1] == 0).any()
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_features_have_exactly_the_declared_types(tmp_path: Path, shop: SimpleNamespace) -> None:
    moments = pa.array([shop.hour(n) for n in range(4)], pa.timestamp("ns", "UTC"))
    columns = {
        "words": "string",
        "whole": "int",
        "part": "float",
        "flag": "bool",
        "at": "timestamp",
    }
    view = shop.features.model_dump(mode="json", exclude_unset=True)["views"]["price"]
    shop.features = shop.declare(views={"price": view | {"columns": columns}}, services={})
    payload = np.array([0x7FF8000000000123, 0x8000000000000000], np.uint64).view(np.float64)
    shop.tables["prices"] = pa.table(
        {
            "shop": pa.array(["ü"] * 4).dictionary_encode(),
            "shelf": pa.array([2**62 + n for n in range(4)]),
            "valid_from": moments,
            "known_at": moments,
            "words": pa.array(["a", None, "", "日本"], pa.large_string()),
            "whole": pa.array([2**53 + 1, -(2**63), None, 0], pa.int64()),
            "part": pa.array([*payload, None, 0.1]),
            "flag": pa.array([True, False, None, True]),
            "at": pa.array([-1, 0, None, 10**15], pa.timestamp("us")),
        }
    )
    open_pipeline(tmp_path, shop).advance(shop.hour(9))
    offline = OfflineStore(tmp_path / "offline", shop.features)
    rows = offline.read("price").sort_by("shelf")
    assert rows["words"].to_pylist() == ["a", None, "", "日本"]
    assert rows["whole"].to_pylist() == [2**53 + 1, -(2**63), None, 0]
    part = rows["part"].combine_chunks()
    assert part.null_count == 1
    stored_bits = part.fill_null(0.0).to_numpy().view(np.uint64)
    assert stored_bits[:2].tolist() == payload.view(np.uint64).tolist()
    assert rows["flag"].to_pylist() == [True, False, None, True]
    assert rows["at"].cast(pa.int64()).to_pylist() == [-1, 0, None, 10**15]
    wrong = shop.tables["prices"].set_column(5, "whole", pa.array([1.0, 2.0, 3.0, 4.0]))
    shop.tables["prices"] = wrong
    with pytest.raises(SchemaError, match="'whole' has the wrong type: expected int, found double"):
        open_pipeline(tmp_path / "wrong", shop)


def test_a_view_that_is_added_later_has_all_the_history(
    tmp_path: Path, shop: SimpleNamespace, backfilled
) -> None:
    whole = shop.features
    few = whole.model_dump(mode="json", exclude_unset=True)["views"]
    del few["by_shop"], few["again"]
    shop.features = shop.declare(views=few)
    open_pipeline(tmp_path, shop).advance(shop.hour(70))
    shop.features = whole
    open_pipeline(tmp_path, shop).advance(shop.hour(120))
    assert same_bits(stored(tmp_path, shop), backfilled(shop))


def test_of_equal_source_rows_the_last_stays(tmp_path: Path, shop: SimpleNamespace) -> None:
    moment = [shop.hour(1)] * 3
    shop.tables["prices"] = pa.table(
        {
            "shop": ["north"] * 3,
            "shelf": [1] * 3,
            "valid_from": moment,
            "known_at": moment,
            "price": [1.0, 2.0, 3.0],
            "stock": [1, 2, 3],
        }
    )
    open_pipeline(tmp_path, shop).advance(shop.hour(5))
    assert stored(tmp_path, shop)["price"]["price"].to_pylist() == [3.0]
    store = open_online(shop.features, tmp_path / "online", "shop")
    key = [np.array(["north"], object), np.array([1])]
    assert store.read_matrix("price", key, np.array([to_us(shop.hour(5))]))[0][0, 0] == 3.0


def test_a_failed_advance_leaves_the_online_store_as_it_was(
    tmp_path: Path, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(tmp_path, shop)
    online = open_online(shop.features, tmp_path / "online", "shop")
    write = type(online).write

    def fail_at_last_view(self, view: str, rows: pa.Table) -> int:
        if view == "shelf_visits":
            raise OSError("no space left")
        return write(self, view, rows)

    monkeypatch.setattr(type(online), "write", fail_at_last_view)
    with pytest.raises(OSError, match="no space"):
        pipeline.advance(shop.hour(50))
    assert [online.cursor(view) for view in VIEWS] == [None] * len(VIEWS)


def test_newest_is_the_last_arrival(tmp_path: Path, shop: SimpleNamespace) -> None:
    newest = open_pipeline(tmp_path, shop).newest
    seen: list[datetime] = shop.tables["visits"]["seen_at"].to_pylist()
    known = shop.tables["prices"].select(["valid_from", "known_at"]).to_pylist()
    assert newest == max([*seen, *(max(row.values()) for row in known)])


def test_a_source_that_lags_behind_loses_nothing(
    tmp_path: Path, shop: SimpleNamespace, backfilled
) -> None:
    prices = shop.tables["prices"]
    early = (pc.field("known_at") < shop.hour(20)) & (pc.field("valid_from") < shop.hour(20))
    shop.tables = shop.tables | {"prices": prices.filter(early)}
    first = open_pipeline(tmp_path, shop)
    first.advance(None)
    assert first.complete_until < shop.hour(40) < shop.hour(80) < first.newest == first.done
    assert first.late_rows() == {}
    shop.tables = shop.tables | {"prices": prices}
    again = open_pipeline(tmp_path, shop)
    again.advance(None)
    assert again.late_rows() == {}
    expected = backfilled(shop)
    for view in ("price", "again"):
        assert stored(tmp_path, shop)[view].equals(expected[view])


def test_rows_that_come_too_late_are_counted_once(tmp_path: Path, shop: SimpleNamespace) -> None:
    visits = shop.tables["visits"].sort_by("seen_at")
    prices = shop.tables["prices"].sort_by("known_at")
    late = visits.slice(300, 3)
    tied = prices.slice(prices.num_rows - 1)
    shop.tables = {"visits": pa.concat_tables([visits[:300], visits[303:]]), "prices": prices}
    # As the source's window moves on, its oldest rows go: they must not make up for the late ones.
    after = {"visits": visits[60:], "prices": pa.concat_tables([prices[60:], tied])}
    usable = late.num_rows - late["shop"].null_count
    counted = {"price": 1, "shop_visits": usable, "shelf_visits": usable}
    for tables, expected in ((shop.tables, {}), (after, counted), (after, {})):
        shop.tables = tables
        pipeline = open_pipeline(tmp_path, shop)
        pipeline.advance(None)
        assert pipeline.late_rows() == expected


def test_equal_arrivals_come_out_the_same_one_by_one_and_at_once(
    tmp_path: Path, shop: SimpleNamespace
) -> None:
    # Known in the wrong order before they hold: what was known last counts, however rows come in.
    def price(known: float, value: float) -> pa.Table:
        row = {"shop": "north", "shelf": 1, "valid_from": shop.hour(5), "stock": 1}
        table = pa.Table.from_pylist([row | {"known_at": shop.hour(known), "price": value}])
        return table.cast(shop.tables["prices"].select(table.column_names).schema)

    rows = [price(3, 1.0), price(2, 2.0)]
    shop.tables["prices"] = rows[0].slice(0, 0)
    one_by_one = open_pipeline(tmp_path / "a", shop, live=True)
    for row in rows:
        one_by_one.extend("prices", row)
        one_by_one.advance(shop.hour(4))
    one_by_one.advance(shop.hour(6))
    shop.tables["prices"] = pa.concat_tables(rows)
    open_pipeline(tmp_path / "b", shop).advance(shop.hour(6))
    for root in ("a", "b"):
        assert stored(tmp_path / root, shop)["price"]["price"].to_pylist() == [1.0]


def test_a_missing_table_and_a_missing_column_are_named(
    tmp_path: Path, shop: SimpleNamespace
) -> None:
    tables = dict(shop.tables)
    shop.tables = {"visits": tables["visits"]}
    with pytest.raises(FeatureStoreError, match="table of source 'prices' is not given"):
        open_pipeline(tmp_path, shop)
    shop.tables = tables | {
        "prices": tables["prices"].rename_columns(
            ["shop", "shelf", "valid_from", "known_at", "prize", "stock"]
        )
    }
    with pytest.raises(SchemaError, match=r"no column 'price'[\s\S]*did you mean 'prize'"):
        open_pipeline(tmp_path, shop)
    words = pa.array(["dear"] * tables["prices"].num_rows)
    shop.tables = tables | {"prices": tables["prices"].set_column(4, "price", words)}
    with pytest.raises(SchemaError, match="'price' has the wrong type: expected a number"):
        open_pipeline(tmp_path, shop)
