from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import compaction, files, intake
from mlops_ray.features.columns import to_us
from mlops_ray.features.definitions import define
from mlops_ray.features.files import TAIL, buckets_of
from mlops_ray.features.join import join_view
from mlops_ray.features.offline import OfflineStore


@pytest.fixture
def store(tmp_path: Path, shop: SimpleNamespace) -> OfflineStore:
    return OfflineStore(tmp_path / "offline", shop.features)


def price_rows(shop: SimpleNamespace, hours: list[int], price: float = 1.0) -> pa.Table:
    moments = [shop.hour(hour) for hour in hours]
    return pa.table(
        {
            "shop": ["north"] * len(hours),
            "shelf": [1] * len(hours),
            "event_time": moments,
            "created_time": moments,
            "price": [price] * len(hours),
            "stock": pa.array([None] * len(hours), pa.float64()),
        },
        schema=define(shop.features, "price").schema,
    )


def many_rows(shop: SimpleNamespace, count: int, hour: int, seed: int = 0) -> pa.Table:
    """Rows of many entities, all created at one hour, each with a price of its own."""
    random = np.random.default_rng([seed, hour])
    moment = np.full(count, to_us(shop.hour(hour)))
    columns = {
        "shop": random.choice(["north", "süd", "ost", "west"], count),
        "shelf": random.integers(0, 500, count),
        "event_time": moment - random.integers(0, 3_600_000_000, count),
        "created_time": moment,
        "price": np.arange(count) + hour * 1e6,
        "stock": random.random(count),
    }
    schema = define(shop.features, "price").schema
    return pa.table([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema)


def append(store: OfflineStore, shop: SimpleNamespace, hours: list[int], until: int) -> int:
    return store.append("price", price_rows(shop, hours), to_us(shop.hour(until)))


def changed(shop: SimpleNamespace, **update: Any) -> Features:
    content = shop.features.model_dump(mode="json")
    content["views"]["price"] |= update
    return Features.model_validate(content)


def prices_of(store: OfflineStore, version: int | None = None) -> list[float]:
    return sorted(store.read("price", version)["price"].to_pylist())


def test_a_version_reads_the_same_rows_later(store: OfflineStore, shop: SimpleNamespace) -> None:
    first = append(store, shop, [1, 2], 2)
    before = store.read("price", first)
    for hour in range(3, 9):
        append(store, shop, [hour], hour)
    assert store.read("price", first).equals(before)
    assert store.read("price").num_rows == 8
    assert store.watermark("price", first) == to_us(shop.hour(2))
    assert store.watermark("price") == to_us(shop.hour(8))


def test_rows_up_to_the_watermark_are_not_stored_twice(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    version = append(store, shop, [1, 2], 2)
    assert append(store, shop, [1, 2], 2) == version
    append(store, shop, [1, 2, 3], 3)
    assert sorted(store.read("price")["created_time"].to_pylist()) == [
        shop.hour(1),
        shop.hour(2),
        shop.hour(3),
    ]


def test_two_writers_store_each_row_once(store: OfflineStore, shop: SimpleNamespace) -> None:
    other = pickle.loads(pickle.dumps(store))
    append(store, shop, [1], 1)
    append(other, shop, [2], 2)
    append(store, shop, [2, 3], 3)
    append(other, shop, [3, 4], 4)
    assert store.read("price").num_rows == 4


def test_a_commit_between_reading_the_watermark_and_writing_is_noticed(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    other = OfflineStore(store.root, shop.features)
    append(store, shop, [1], 1)

    def elsewhere(hours: list[int], until: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(append, other, shop, hours, until).result()

    class Interrupted(list):
        """Lets the other writer commit while this one's rows are being written."""

        calls = 0

        def __iter__(self):
            Interrupted.calls += 1
            if Interrupted.calls == 1:
                elsewhere([2], 2)
            return super().__iter__()

    store.append("price", Interrupted([price_rows(shop, [2, 3])]), to_us(shop.hour(3)))
    assert Interrupted.calls == 2
    times = store.read("price")["created_time"].to_pylist()
    assert sorted(times) == [shop.hour(1), shop.hour(2), shop.hour(3)]

    def stream():
        elsewhere([4], 4)
        yield price_rows(shop, [4, 5])

    with pytest.raises(FeatureStoreError, match="another writer"):
        store.append("price", stream(), to_us(shop.hour(5)))
    assert store.watermark("price") == to_us(shop.hour(4))


def test_many_writers_at_once_store_each_row_once(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    def write(_: int) -> None:
        mine = OfflineStore(store.root, shop.features)
        for hour in range(1, 9):
            while True:
                try:
                    append(mine, shop, list(range(1, hour + 1)), hour)
                    break
                except FeatureStoreError:
                    continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    times = store.read("price")["created_time"].to_pylist()
    assert sorted(times) == [shop.hour(hour) for hour in range(1, 9)]


def test_event_times_and_columns_can_be_chosen(store: OfflineStore, shop: SimpleNamespace) -> None:
    append(store, shop, [1, 2, 3, 4], 4)
    found = store.read(
        "price", since=shop.hour(2), until=shop.hour(3), columns=["event_time", "price"]
    )
    assert found.column_names == ["event_time", "price"]
    assert sorted(found["event_time"].to_pylist()) == [shop.hour(2), shop.hour(3)]
    only = store.read("price", since=shop.hour(4), columns=["price"])
    assert only.to_pydict() == {"price": [1.0]}


def test_before_any_commit(store: OfflineStore) -> None:
    assert store.version("price") == -1
    assert store.watermark("price") is None
    assert store.table_id("price") == "" == store.generation("price")
    assert store.stored_schema("price") is None
    assert store.version_at("price", datetime.now(UTC)) == -1
    assert store.compact("price") == -1
    assert store.vacuum("price") == []
    assert store.read("price").num_rows == 0
    assert store.read("price", -1).schema.names[:2] == ["shop", "shelf"]
    assert list(store.changes("price", -1)) == []
    with pytest.raises(FeatureStoreError, match="no version 3"):
        store.read("price", 3)


def test_an_empty_commit_makes_the_table(store: OfflineStore, shop: SimpleNamespace) -> None:
    assert store.append("price", [], to_us(shop.hour(1))) == 0
    assert store.watermark("price") == to_us(shop.hour(1))
    assert store.append("price", [], to_us(shop.hour(2))) == 1
    assert store.read("price").num_rows == 0


def test_a_version_that_is_not_there(store: OfflineStore, shop: SimpleNamespace) -> None:
    append(store, shop, [1], 1)
    with pytest.raises(FeatureStoreError, match="version 9 cannot be read"):
        store.read("price", 9)


def test_another_definition_has_a_table_of_its_own(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    append(store, shop, [1], 1)
    for update, same in (
        ({"ttl": None, "description": "what it costs"}, True),
        ({"columns": ["price"]}, True),
        ({"version": 2}, False),
        ({"event_time": "known_at"}, False),
    ):
        other = OfflineStore(store.root, changed(shop, **update))
        assert (other.watermark("price") is not None) == same


def test_types_are_kept_exactly(tmp_path: Path, shop: SimpleNamespace) -> None:
    columns = {"n": "int", "text": "string", "yes": "bool", "when": "timestamp", "x": "float"}
    store = OfflineStore(tmp_path / "typed", changed(shop, columns=columns))
    moment = datetime(1901, 2, 3, 4, 5, 6, 789, UTC)
    rows = {
        "shop": ["ü", None, ""],
        "shelf": [2**62 + 1, -1, None],
        "event_time": [moment] * 3,
        "created_time": [moment + timedelta(microseconds=1)] * 3,
        "n": [2**53 + 1, None, -(2**63)],
        "text": ["", None, "日本"],
        "yes": [True, None, False],
        "when": [moment, None, datetime(2999, 1, 1, tzinfo=UTC)],
        "x": [float("nan"), None, -0.0],
    }
    schema = define(changed(shop, columns=columns), "price").schema
    store.append("price", pa.table(rows, schema=schema), 0)
    found = store.read("price").sort_by("n").to_pydict()
    assert repr([found["x"][1], found["x"][0], found["x"][2]]) == "[nan, -0.0, None]"
    order = [2, 0, 1]
    for name in set(rows) - {"x"}:
        assert found[name] == [rows[name][place] for place in order]


@pytest.fixture
def small_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as many rows is little, so that buckets are used."""
    monkeypatch.setattr(intake, "TAIL_ROWS", 500)
    monkeypatch.setattr("mlops_ray.features.compaction.TAIL_ROWS", 500)
    monkeypatch.setattr(intake, "_BUFFER_ROWS", 2000)
    monkeypatch.setattr(files, "GROUP_ROWS", 64)
    monkeypatch.setattr(files, "BATCH_ROWS", 100)


@pytest.mark.usefixtures("small_tail")
def test_many_rows_lie_sorted_in_buckets_by_entity(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    rows = many_rows(shop, 3000, 1)
    store.append("price", (rows.slice(at, 700) for at in range(0, 3000, 700)), 10**18)
    found = store.files("price")
    assert {file.bucket for file in found} == set(range(16))
    for file in found:
        part = files.read_file(store.path("price"), file, rows.schema)
        assert set(buckets_of(part, ["shop", "shelf"], 16)) == {file.bucket}
        keys = list(zip(*(part[n].to_pylist() for n in rows.schema.names[:4]), strict=True))
        assert keys == sorted(keys)
        assert file.rows == part.num_rows
    assert prices_of(store) == sorted(rows["price"].to_pylist())


@pytest.mark.usefixtures("small_tail")
def test_written_buckets_are_seen_with_their_commit(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    rows = many_rows(shop, 1000, 2)
    bucket = buckets_of(rows, ["shop", "shelf"], store.buckets("price"))
    written = [
        pickle.loads(pickle.dumps(store)).write_bucket(
            "price", b, rows.filter(pa.array(bucket == b))
        )
        for b in range(16)
    ]
    assert store.version("price") == -1
    until = to_us(shop.hour(2))
    assert store.commit("price", written, until, "code") == 0
    assert store.commit("price", written, until, "code") == 0
    assert prices_of(store) == sorted(rows["price"].to_pylist())
    assert store.watermark("price", generation="code") == until
    late = store.write_bucket("price", 0, rows.filter(pa.array(bucket == 0)))
    with pytest.raises(FeatureStoreError, match="stored already"):
        store.commit("price", [late], until + 1, "code")


def test_another_generation_takes_the_place_of_all_rows(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    until = to_us(shop.hour(5))
    first = store.append("price", price_rows(shop, [1, 2], 1.0), until, "old")
    assert store.watermark("price", generation="new") is None
    fresh = OfflineStore(store.root, shop.features)
    second = fresh.append("price", price_rows(shop, [1, 2, 3], 2.0), until, "new")
    assert prices_of(fresh) == [2.0] * 3
    assert prices_of(fresh, first) == [1.0] * 2
    assert fresh.watermark("price", generation="old") is None
    assert fresh.watermark("price", generation="new") == until
    assert fresh.generation("price") != fresh.generation("price", first) != ""
    with pytest.raises(FeatureStoreError, match="replaced all rows"):
        fresh.changes("price", first)
    assert sum(batch.num_rows for batch in fresh.changes("price", second)) == 0
    # The first writer's next rows go on from rows that are no longer there.
    with pytest.raises(FeatureStoreError, match="rows that other code made"):
        store.append("price", price_rows(shop, [6], 1.0), until + 10**12, "old")
    back = OfflineStore(store.root, shop.features)
    back.append("price", price_rows(shop, [1], 3.0), until, "old")
    assert prices_of(back) == [3.0]


def test_a_generation_outlives_checkpoints(store: OfflineStore, shop: SimpleNamespace) -> None:
    for hour in range(1, 121):
        store.append("price", price_rows(shop, [hour]), to_us(shop.hour(hour)), "code")
    assert list((store.path("price") / "_delta_log").glob("*checkpoint*.parquet"))
    again = OfflineStore(store.root, shop.features)
    assert again.watermark("price", generation="code") == to_us(shop.hour(120))
    assert again.watermark("price", 50, generation="code") == to_us(shop.hour(51))
    assert again.buckets("price") == 16
    assert again.read("price", 3).num_rows == 4


def test_changes_are_the_rows_of_the_commits_between(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    for hour in range(1, 7):
        append(store, shop, [hour], hour)
        if hour == 4:
            store.compact("price")

    def hours(after: int, upto: int | None = None) -> list[int]:
        batches = list(store.changes("price", after, upto))
        assert all(batch.schema == define(shop.features, "price").schema for batch in batches)
        moments = [m for batch in batches for m in batch["created_time"].to_pylist()]
        return [(moment - shop.start) // timedelta(hours=1) for moment in moments]

    assert hours(-1) == [1, 2, 3, 4, 5, 6]
    assert hours(-1, 0) == [1]
    assert hours(1, 3) == [3, 4]
    assert hours(3, 4) == []
    assert hours(3) == [5, 6]
    assert hours(6) == []


def test_the_version_of_a_moment(store: OfflineStore, shop: SimpleNamespace) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    moments = []
    for hour in range(1, 5):
        append(store, shop, [hour], hour)
        # Delta's commits carry whole milliseconds.
        moments.append(datetime.now(UTC) + timedelta(milliseconds=1))
        while datetime.now(UTC) < moments[-1] + timedelta(milliseconds=2):
            pass
    assert [store.version_at("price", moment) for moment in [before, *moments]] == [-1, 0, 1, 2, 3]
    assert store.version_at("price", datetime.now(UTC) + timedelta(days=1)) == 3


def test_columns_may_be_added_and_left_out(store: OfflineStore, shop: SimpleNamespace) -> None:
    first = append(store, shop, [1], 1)
    wide = changed(shop, columns={"price": "float", "stock": "float", "label": "string"})
    wider = OfflineStore(store.root, wide)
    assert wider.read("price")["label"].to_pylist() == [None]
    rows = price_rows(shop, [2]).append_column("label", pa.array(["new"]))
    wider.append("price", rows, to_us(shop.hour(2)))
    assert sorted(wider.read("price")["label"].to_pylist(), key=str) == [None, "new"]
    assert wider.read("price", first)["label"].to_pylist() == [None]
    assert wider.stored_schema("price").field("label").type == pa.string()
    narrow = OfflineStore(store.root, changed(shop, columns=["price"]))
    narrow.append("price", price_rows(shop, [3]), to_us(shop.hour(3)))
    assert narrow.read("price").column_names[-1] == "price"
    wider.compact("price")
    assert sorted(wider.read("price")["label"].to_pylist(), key=str) == [None, None, "new"]
    append(store, shop, [4], 4)
    assert len(wider.read("price")["label"].drop_null()) == 1


def test_a_changed_type_is_refused_with_reason_and_fix(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    append(store, shop, [1], 1)
    other = OfflineStore(store.root, changed(shop, columns={"price": "string", "stock": "float"}))
    rows = price_rows(shop, [2])
    texts = rows["price"].cast(pa.string())
    rows = rows.set_column(rows.column_names.index("price"), "price", texts)
    attempts: list[Callable[[], Any]] = [
        lambda: other.append("price", rows, to_us(shop.hour(2))),
        lambda: other.read("price"),
    ]
    for attempt in attempts:
        with pytest.raises(FeatureStoreError, match="'price' is declared as string") as caught:
            attempt()
        assert "raise the view's version" in caught.value.fix
        assert "double" in str(caught.value)
    assert store.read("price").num_rows == 1


@pytest.mark.usefixtures("small_tail")
def test_compaction_keeps_every_row_and_every_version(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    expected: list[float] = []
    states = {}
    for hour in range(1, 31):
        rows = many_rows(shop, 120, hour)
        expected += rows["price"].to_pylist()
        states[store.append("price", rows, to_us(shop.hour(hour)))] = sorted(expected)
        if hour % 7 == 0:
            states[store.compact("price")] = sorted(expected)
    for version, prices in states.items():
        assert prices_of(store, version) == prices
    version = store.compact("price")
    assert store.compact("price") == version
    found = store.files("price")
    assert {file.bucket for file in found} - {TAIL} == set(range(16))
    assert len(found) < 16 * 4
    assert store.watermark("price") == to_us(shop.hour(30))
    assert sum(batch.num_rows for batch in store.changes("price", -1)) == len(expected)


def test_a_short_tail_becomes_one_file(store: OfflineStore, shop: SimpleNamespace) -> None:
    for hour in range(1, 12):
        append(store, shop, [hour], hour)
    version = store.compact("price")
    assert [file.bucket for file in store.files("price")] == [TAIL]
    assert store.read("price").num_rows == 11
    assert store.compact("price") == version


@pytest.mark.usefixtures("small_tail")
def test_compaction_beside_appends_loses_nothing(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    other = OfflineStore(store.root, shop.features)
    store.append("price", many_rows(shop, 100, 0), to_us(shop.hour(0)))
    with ThreadPoolExecutor(2) as pool:
        compacting = pool.submit(lambda: [other.compact("price") for _ in range(15)])
        for hour in range(1, 61):
            while True:
                try:
                    rows = many_rows(shop, 100, hour)
                    store.append("price", rows, to_us(shop.hour(hour)))
                    break
                except FeatureStoreError:
                    continue
        compacting.result()
    expected = [p for hour in range(61) for p in many_rows(shop, 100, hour)["price"].to_pylist()]
    assert prices_of(store) == sorted(expected)


@pytest.mark.usefixtures("small_tail")
def test_compaction_gives_way_to_a_new_generation(
    store: OfflineStore, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlops_ray.features import compaction

    for hour in (1, 2):
        store.append("price", many_rows(shop, 300, hour), to_us(shop.hour(hour)), "old")
    swap = compaction._swap

    def interrupted(*args: Any) -> int:
        other = OfflineStore(store.root, shop.features)
        other.append("price", price_rows(shop, [1], 7.0), to_us(shop.hour(1)), "new")
        return swap(*args)

    monkeypatch.setattr(compaction, "_swap", interrupted)
    assert store.compact("price") == store.version("price")
    assert prices_of(store) == [7.0]


def age(path: Path, days: int) -> None:
    import os

    for file in path.rglob("*.parquet"):
        moment = file.stat().st_mtime - days * 86400
        os.utime(file, (moment, moment))


def pin(store: OfflineStore, shop: SimpleNamespace, version: int) -> str:
    from mlops_ray.features.manifest import TrainingManifest, ViewPin, write_manifest

    view = ViewPin(
        definition=define(shop.features, "price").digest,
        table=store.table_id("price"),
        version=version,
        generation="",
        ttl_us=None,
        features={},
    )
    manifest = TrainingManifest(
        service="buys",
        labels="",
        views={"price": view},
        until=None,
        known_only=True,
        on_demand="",
        rows=0,
        result="",
    )
    return write_manifest(store.root, manifest)


@pytest.mark.usefixtures("small_tail")
def test_vacuum_leaves_the_newest_and_every_pinned_version(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    from mlops_ray.features.manifest import unpin

    states = {}
    for hour in range(1, 25):
        rows = many_rows(shop, 120, hour)
        version = store.append("price", rows, to_us(shop.hour(hour)))
        states[version] = prices_of(store)
        if hour % 8 == 0:
            version = store.compact("price")
            states[version] = prices_of(store)
    pinned = sorted(states)[5]
    manifest = pin(store, shop, pinned)
    old = store.write_bucket("price", 0, rows)
    age(store.path("price"), 1)
    young = store.write_bucket("price", 0, rows)
    assert store.vacuum("price", retention=timedelta(days=7)) == []
    assert store.vacuum("price", retention=timedelta(hours=1), dry_run=True) == [old.path]
    doomed = store.vacuum("price", retention=timedelta(0), dry_run=True)
    assert young.path in doomed
    assert prices_of(store, 1) == states[1]
    deleted = store.vacuum("price", retention=timedelta(0))
    assert deleted == doomed
    assert len(deleted) > 10
    assert prices_of(store) == states[max(states)]
    assert prices_of(store, pinned) == states[pinned]
    with pytest.raises(FeatureStoreError, match="vacuum"):
        store.read("price", 9)
    with pytest.raises(FeatureStoreError, match="vacuum"):
        store.changes("price", -1)
    unpin(store.root, manifest)
    assert store.vacuum("price", retention=timedelta(0))
    assert prices_of(store) == states[max(states)]


def test_an_unfinished_write_is_left_alone_for_the_retention(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    append(store, shop, [1], 1)
    old = store.write_bucket("price", 0, price_rows(shop, [2]))
    age(store.path("price"), 8)
    young = store.write_bucket("price", 0, price_rows(shop, [2]))
    assert store.vacuum("price", retention=timedelta(days=7)) == [old.path]
    assert store.commit("price", [young], to_us(shop.hour(2))) == 1
    assert store.read("price").num_rows == 2


def test_a_row_without_its_times_is_refused(store: OfflineStore, shop: SimpleNamespace) -> None:
    rows = price_rows(shop, [1])
    rows = rows.set_column(2, "event_time", pa.nulls(1, rows.schema.field(2).type))
    with pytest.raises(FeatureStoreError, match="event_time"):
        store.append("price", rows, to_us(shop.hour(1)))
    assert store.version("price") == -1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), max_size=12), st.integers(0, 9))
def test_any_split_into_commits_stores_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[int, int]], compact_at: int
) -> None:
    from tests.features.conftest import START, declare

    features = declare()
    store = OfflineStore(tmp_path_factory.mktemp("split"), features)
    schema = define(features, "price").schema
    for number, (shelf, hour) in enumerate(items):
        created = START + timedelta(hours=number)
        event = START + timedelta(hours=hour)
        values = [["s"], [shelf], [event], [created], [float(number)], [None]]
        rows = pa.table([pa.array(v, f.type) for v, f in zip(values, schema, strict=True)], schema)
        store.append("price", rows, to_us(created))
        if number == compact_at:
            store.compact("price")
    assert prices_of(store) == [float(number) for number in range(len(items))]


def test_a_scan_on_ray_is_the_read(
    ray_cluster: Any, store: OfflineStore, shop: SimpleNamespace
) -> None:
    for hour in range(1, 5):
        store.append("price", many_rows(shop, 50, hour), to_us(shop.hour(hour)))
    span = {"since": shop.hour(1), "until": shop.hour(3)}
    expected = store.read("price", **span).sort_by("price")
    blocks = store.scan("price", **span).iter_batches(batch_format="pyarrow", batch_size=None)
    found = pa.concat_tables([expected.schema.empty_table(), *blocks]).sort_by("price")
    assert found.equals(expected)
    assert 0 < found.num_rows < 200
    assert store.scan("price", since=shop.hour(90)).count() == 0


@pytest.mark.usefixtures("small_tail")
def test_any_reader_of_delta_sees_the_same_rows(store: OfflineStore, shop: SimpleNamespace) -> None:
    """The statistics in the log are true: a filter that skips files by them loses no row."""
    from deltalake import DeltaTable
    from pyarrow import dataset
    from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

    for hour in range(1, 9):
        store.append("price", many_rows(shop, 120, hour), to_us(shop.hour(hour)))
        if hour == 6:
            store.compact("price")
    folder = str(store.path("price"))
    filesystem = SubTreeFileSystem(folder, LocalFileSystem())
    other = DeltaTable(folder).to_pyarrow_dataset(filesystem=filesystem)
    since, until = shop.hour(4) - timedelta(minutes=7), shop.hour(6) - timedelta(microseconds=1)
    chosen = (dataset.field("event_time") >= since) & (dataset.field("event_time") <= until)
    theirs = other.to_table(filter=chosen).drop_columns(["bucket"]).sort_by("price")
    ours = store.read("price", since=since, until=until).sort_by("price")
    assert 100 < ours.num_rows < 400
    assert theirs.select(ours.column_names).cast(ours.schema).equals(ours)


def test_a_row_created_after_the_watermark_is_refused(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    append(store, shop, [1], 1)
    with pytest.raises(FeatureStoreError, match="3600000000 µs after the watermark"):
        append(store, shop, [2, 3], 2)
    written = store.write_bucket("price", 0, price_rows(shop, [2, 3]))
    with pytest.raises(FeatureStoreError, match="3600000000 µs after the watermark") as caught:
        store.commit("price", [written], to_us(shop.hour(2)))
    assert written.path in (caught.value.where or "")
    assert store.version("price") == 0
    append(store, shop, [2, 3], 3)
    assert store.read("price").num_rows == 3


def test_a_negative_version_is_not_there(store: OfflineStore, shop: SimpleNamespace) -> None:
    append(store, shop, [1], 1)
    for read in (store.read, store.watermark, store.generation):
        with pytest.raises(FeatureStoreError, match="no version -2"):
            read("price", -2)


@pytest.mark.usefixtures("small_tail")
def test_the_tail_stays_short_while_rows_are_appended(
    store: OfflineStore, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlops_ray.features.offline._TIDY_EVERY", 4)
    for hour in range(1, 34):
        store.append("price", many_rows(shop, 40, hour), to_us(shop.hour(hour)))
        tail = [file for file in store.files("price") if file.bucket == TAIL]
        assert max((file.rows for file in tail), default=0) <= compaction.TAIL_ROWS
        assert sum(file.rows for file in tail) <= compaction.TAIL_ROWS + 4 * 40
    assert prices_of(store) == sorted(n + hour * 1e6 for hour in range(1, 34) for n in range(40))


def test_what_is_stored_is_stored_though_tidying_fails(
    store: OfflineStore, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mlops_ray.features.offline._TIDY_EVERY", 2)
    monkeypatch.setattr("mlops_ray.features.compaction.write_file", full)
    assert [append(store, shop, [hour], hour) for hour in range(1, 6)] == [0, 1, 2, 3, 4]
    assert store.read("price").num_rows == 5


def test_a_table_that_was_removed_meanwhile_is_noticed(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    import shutil

    for hour in range(1, 4):
        append(store, shop, [hour], hour)
    shutil.rmtree(store.path("price"))
    other = OfflineStore(store.root, shop.features)
    for hour in range(11, 17):
        append(other, shop, [hour], hour)
    with pytest.raises(FeatureStoreError, match="removed meanwhile"):
        append(store, shop, [20], 20)
    assert other.read("price").num_rows == 6
    store.append("price", price_rows(shop, [30]), to_us(shop.hour(30)), "other code")
    assert store.read("price")["created_time"].to_pylist() == [shop.hour(30)]


def test_who_reads_the_watermark_of_a_remade_table_goes_on_from_it(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    import shutil

    append(store, shop, [1, 2, 3], 3)
    shutil.rmtree(store.path("price"))
    append(OfflineStore(store.root, shop.features), shop, [1], 1)
    assert store.watermark("price") == to_us(shop.hour(1))
    append(store, shop, [1, 2, 3], 3)
    assert store.read("price").num_rows == 3


@pytest.mark.usefixtures("small_tail")
def test_compaction_does_not_change_which_of_equal_rows_counts(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    """Of one commit's files the last one's row counts, also when only others are small."""
    [bucket] = set(buckets_of(price_rows(shop, [1]), ["shop", "shelf"], store.buckets("price")))
    first = store.write_bucket("price", int(bucket), price_rows(shop, [1], 1.0))
    last = pa.concat_tables([price_rows(shop, [1], 2.0), price_rows(shop, [2] * 60, 3.0)])
    second = store.write_bucket("price", int(bucket), last)
    store.commit("price", [first, second], to_us(shop.hour(2)))
    third = store.write_bucket("price", int(bucket), price_rows(shop, [5]))
    store.commit("price", [third], to_us(shop.hour(5)))
    labels = pa.table({"shop": ["north"], "shelf": [1], "at": [shop.hour(1)]})
    before = join_view(shop.features, "price", labels, "at", store)["price__price"].to_pylist()
    version = store.version("price")
    assert store.compact("price") == version + 1
    after = join_view(shop.features, "price", labels, "at", store)["price__price"].to_pylist()
    assert before == after == [2.0]


def test_a_file_is_on_disk_before_a_commit_names_it(
    store: OfflineStore, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    synced: set[int] = set()
    fsync = os.fsync

    def note(number: int) -> None:
        synced.add(os.fstat(number).st_ino)
        fsync(number)

    monkeypatch.setattr(os, "fsync", note)
    append(store, shop, [1], 1)
    [file] = store.files("price")
    path = store.path("price") / file.path
    assert {path.stat().st_ino, path.parent.stat().st_ino} <= synced


def test_a_pin_of_a_table_that_was_removed_does_not_hinder_vacuum(
    store: OfflineStore, shop: SimpleNamespace
) -> None:
    import shutil

    for hour in range(1, 5):
        append(store, shop, [hour], hour)
    pin(store, shop, 3)
    shutil.rmtree(store.path("price"))
    other = OfflineStore(store.root, shop.features)
    append(other, shop, [1], 1)
    assert other.vacuum("price", retention=timedelta(0)) == []


def test_streamed_rows_are_written_a_bounded_number_at_a_time(
    store: OfflineStore, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_BUFFER_ROWS", 100)
    written: list[int] = []
    plain = intake.by_bucket

    def note(rows: pa.Table, keys: Any, count: int) -> Any:
        written.append(rows.num_rows)
        return plain(rows, keys, count)

    monkeypatch.setattr(intake, "by_bucket", note)
    parts = (many_rows(shop, 30, hour) for hour in range(1, 12))
    store.append("price", parts, to_us(shop.hour(11)))
    assert written == [120, 120, 90]
