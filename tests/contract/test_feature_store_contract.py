"""What every store and every join engine owes: the ten points of the feature store's contract.

The oracle (``oracle.py``) is plain Python; DuckDB gives a second opinion on it wherever rows are drawn
at random.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contract import oracle, second_opinion, world
from contract.world import KEYS, NAMES, TTLS, label, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_ray.config.features import Features
from mlops_ray.errors import MlopsRayError, SchemaError
from mlops_ray.features.columns import from_us, to_us
from mlops_ray.features.definitions import define
from mlops_ray.features.keys import key_hash
from mlops_ray.features.lookup import OnlineLookup
from mlops_ray.features.manifest import read_manifest
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.reproduction import digest_table, make_training_set, training_set_of
from mlops_ray.features.service import feature_columns, inputs_of
from mlops_ray.features.training_set import build_training_set
from mlops_ray.metadata.types import FeatureVersions

HASHES_OF_TEXTS = [
    17696951074988357315,
    3515587182635193913,
    2527596039950405718,
    10964835192106221055,
    1428859969844257644,
]
HASHES_OF_NUMBERS = [
    2975641494991520406,
    10127858673864917041,
    5573041611216156032,
    4383298617594777939,
    2245636829201459325,
]
HASHES_OF_BOTH = [
    18321465060116962114,
    17552203868894644371,
    13937982007555310150,
    133632810953555699,
    3641560530134056045,
]
WAYS = ("one", "many", "buckets", "compacted")
FEATURES = world.declare()

_moments = st.integers(-30, 30)
_rows = st.lists(
    st.fixed_dictionaries(
        {
            "shop": st.sampled_from(["north", "süd", "", "n\x00rth", None]),
            "shelf": st.sampled_from([1, 2, -1, None]),
            "event": _moments,
            "created": _moments,
            "price": st.sampled_from([None, 0.0, -0.0, float("nan"), float("inf"), 1.5]),
            "stock": st.sampled_from([None, 0, 2**53 + 1, -(2**63), 2**63 - 1]),
            "open": st.sampled_from([None, True, False]),
            "note": st.sampled_from([None, "", "ü", "\x00", "long " * 90]),
            "since": st.sampled_from([None, -1, 0, 2**50]),
        }
    ),
    max_size=14,
    unique_by=lambda item: (item["shop"], item["shelf"], item["event"], item["created"]),
)
_labels = st.lists(
    st.fixed_dictionaries(
        {
            "shop": st.sampled_from(["north", "süd", "", "n\x00rth", "nobody", None]),
            "shelf": st.sampled_from([1, 2, -1, 3, None]),
            "at": st.integers(-40, 50),
        }
    ),
    min_size=1,
    max_size=10,
)


def many(count: int) -> Any:
    """Settings of a property that is tried with ``count`` inputs."""
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def examples(request: pytest.FixtureRequest, quick: int, slow: int) -> int:
    """How many inputs to try: Ray and Redis cost more by the input."""
    return slow if "ray" in request.node.name or "redis" in request.node.name else quick


def stored(
    folder: Path, view: str, rows: Sequence[Mapping[str, Any]], how: str = "one", **changes: Any
) -> Any:
    """A new offline store with rows in a view."""
    features = world.declare(**changes)
    store = world.open_offline(folder / uuid.uuid4().hex, features)
    world.fill(store, features, view, rows, how)
    return store


def check_join(
    engine: Any,
    folder: Path,
    view: str,
    rows: Sequence[Mapping[str, Any]],
    labels: Sequence[Mapping[str, Any]],
    how: str = "one",
    known_only: bool = True,
    buckets: int = 4,
) -> None:
    """The engine agrees with the oracle, and DuckDB with both."""
    store = stored(folder, view, rows, how, offline={"buckets": buckets})
    ttl = TTLS.get(view)
    keys = KEYS.get(view, KEYS["item"])
    due = oracle.join(labels, rows, keys, NAMES, ttl, known_only)
    asked = world.label_table(labels)
    whole = world.table(FEATURES, view, rows)
    world.assert_equal(second_opinion.join(asked, whole, keys, NAMES, ttl, known_only), due)
    world.assert_equal(engine(FEATURES, view, store, asked, known_only), due)


# 1. Duplicates of (entity, event time): the newest created wins.


@pytest.mark.parametrize("how", WAYS)
def test_01_the_newest_created_of_duplicates_wins_offline(
    engine: Any, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    @many(examples(request, 12, 2))
    @given(_rows, _labels, st.randoms(), st.sampled_from([1, 4, 16]))
    def check(rows: Any, labels: Any, shuffle: random.Random, buckets: int) -> None:
        shuffle.shuffle(rows)
        check_join(engine, tmp_path, "item", rows, labels, how, buckets=buckets)

    check()


def test_01_the_newest_created_of_duplicates_wins_online(
    open_store: Any, request: pytest.FixtureRequest
) -> None:
    count = itertools.count()

    @many(examples(request, 25, 12))
    @given(_rows, _labels, st.randoms(), st.integers(1, 4))
    def check(rows: Any, labels: Any, shuffle: random.Random, parts: int) -> None:
        shuffle.shuffle(rows)
        online = open_store(FEATURES, str(next(count)))
        for part in np.array_split(np.arange(len(rows)), parts):
            online.write("item", [rows[number] for number in part])
        due = [oracle.look_up(item, rows, KEYS["item"], NAMES, None) for item in labels]
        assert_statuses(online.look_up("item", labels), due)

    check()


def assert_statuses(found: Sequence[Mapping[str, Any]], due: Sequence[Mapping[str, Any]]) -> None:
    """Every value and status of every key is what it should be."""
    for ours, theirs in zip(found, due, strict=True):
        for name, (value, status) in theirs.items():
            assert ours[name][1] == status, (name, ours[name], theirs[name])
            assert world.equal(ours[name][0], value), (name, ours[name], theirs[name])


@pytest.mark.parametrize("how", WAYS[:1])
def test_01_of_equal_rows_the_one_written_last_counts(
    engine: Any, how: str, tmp_path: Path
) -> None:
    rows = [row(5, 5, price=1.0), row(5, 6, price=2.0)]
    store = stored(tmp_path, "item", rows[:1])
    store.append("item", world.table(FEATURES, "item", rows[1:]), 6)
    found = engine(FEATURES, "item", store, world.label_table([label(5), label(6)]))
    assert [item["price"] for item in found] == [1.0, 2.0]


# 2. TTL edges.


@pytest.mark.parametrize("view", list(TTLS))
def test_02_ttl_edges_offline(engine: Any, view: str, tmp_path: Path) -> None:
    rows = [row(event) for event in (-100, 0, 1000)]
    ttl = TTLS[view] or 0
    labels = [label(r["event"] + d) for r in rows for d in (-1, 0, 1, ttl, ttl + 1)]
    check_join(engine, tmp_path, view, rows, labels)


def test_02_ttl_edges_spelt_out(engine: Any, tmp_path: Path) -> None:
    rows = [row(100, price=7.0)]
    labels = world.label_table([label(at) for at in (99, 100, 101, 110, 111, 10**15)])
    due = {
        "item": [None, 7.0, 7.0, 7.0, 7.0, 7.0],
        "item_now": [None, 7.0, None, None, None, None],
        "item_short": [None, 7.0, 7.0, 7.0, None, None],
    }
    for view, prices in due.items():
        found = engine(FEATURES, view, stored(tmp_path, view, rows), labels)
        assert [item["price"] for item in found] == prices


@pytest.mark.parametrize("view", list(TTLS))
def test_02_ttl_edges_online(open_store: Any, view: str) -> None:
    online = open_store(FEATURES)
    rows = [row(100, price=7.0), row(-100, shelf=2)]
    online.write(view, rows)
    ttl = TTLS[view] or 0
    asked = [
        label(r["event"] + d, shelf=r["shelf"]) for r in rows for d in (-1, 0, 1, ttl, ttl + 1)
    ]
    due = [oracle.look_up(item, rows, KEYS["item"], NAMES, TTLS[view]) for item in asked]
    assert_statuses(online.look_up(view, asked), due)
    statuses = [item["price"][1] for item in online.look_up(view, asked[:5])]
    last = {"item": "present", "item_now": "expired", "item_short": "present"}[view]
    after = "present" if view == "item" else "expired"
    first = "expired" if view == "item_now" else "present"
    assert statuses == ["not found", "present", first, last if ttl else "present", after]


# 3 and 4. Labels stay: all, in order, untouched.


def test_03_known_entities_without_a_row_and_unknown_ones_stay(engine: Any, tmp_path: Path) -> None:
    labels = [label(3), label(50, shop="nobody"), label(60), label(50, shelf=9), label(55)]
    check_join(engine, tmp_path, "item_short", [row(50)], labels)
    store = stored(tmp_path, "item_short", [row(50)])
    found = engine(FEATURES, "item_short", store, world.label_table(labels))
    assert [item["stock"] for item in found] == [None, None, 50, None, 50]


def test_03_a_view_without_any_row_or_table(engine: Any, tmp_path: Path) -> None:
    labels = [label(3), label(4)]
    empty = stored(tmp_path, "item", [])
    nothing = world.open_offline(tmp_path / "nowhere", FEATURES)
    for store in (empty, nothing):
        found = engine(FEATURES, "item", store, world.label_table(labels))
        assert found == [dict.fromkeys(NAMES)] * 2


def test_03_no_labels_at_all(engine: Any, tmp_path: Path) -> None:
    store = stored(tmp_path, "item", [row(1)])
    assert engine(FEATURES, "item", store, world.label_table([])) == []


def test_04_duplicate_labels_stay(engine: Any, tmp_path: Path) -> None:
    labels = [label(5), label(9), label(5), label(5, shelf=2), label(9), label(5)]
    check_join(engine, tmp_path, "item", [row(4), row(7)], labels)


def label_source(labels: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Labels as the cleaned rows of the label source; three ids, so that some come twice."""
    asked = world.label_table(labels).drop_columns(["number"])
    count = len(labels)
    columns = {
        "id": [f"l{number % 3}" for number in range(count)],
        "label": pa.array([number % 2 for number in range(count)], pa.int8()),
        "known_at": asked["at"],
        "shop_note": [f"untouched {number}" for number in range(count)],
    }
    for name, values in columns.items():
        asked = asked.append_column(name, pa.chunked_array([values]))
    return asked


def test_04_a_training_set_has_every_label_untouched(on_ray: bool, tmp_path: Path) -> None:
    store = stored(tmp_path, "item", [row(4), row(7)])
    moments = [9, 5, 5, 5, 1, 9, 9]
    labels = label_source([label(at) for at in moments])
    table, count = build_training_set(FEATURES, "all", labels, store, {}, None, on_ray=on_ray)
    assert count.labelled == table.num_rows == len(moments)
    due = sorted(zip(moments, labels["id"].to_pylist(), labels["label"].to_pylist(), strict=True))
    at = table["at"].cast(pa.int64()).to_pylist()
    found = sorted(zip(at, table["id"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert found == due
    assert at == sorted(moments)
    assert table["item__stock"].to_pylist() == [None, 4, 4, 4, 7, 7, 7]
    assert set(table["shop"].to_pylist()) == {"north"}


# 5. Values keep their types, nulls and bits.


def test_05_a_null_in_the_newest_row_stays_null(engine: Any, tmp_path: Path) -> None:
    nothing = dict.fromkeys(NAMES)
    rows = [row(1), row(2, **nothing), row(3, shelf=2), row(4, shelf=2, price=None)]
    labels = [label(1), label(2), label(9), label(9, shelf=2)]
    check_join(engine, tmp_path, "item", rows, labels)


def test_05_null_and_nan_and_integers_online(open_store: Any) -> None:
    online = open_store(FEATURES)
    rows = [
        row(1, price=float("nan"), stock=2**53 + 1, note=""),
        row(1, shelf=2, **dict.fromkeys(NAMES)),
    ]
    online.write("item", rows)
    first, second = online.look_up("item", [label(5), label(5, shelf=2)])
    assert first["price"][1] == "present"
    assert first["price"][0] != first["price"][0]
    assert first["stock"] == (2**53 + 1, "present")
    assert first["note"] == ("", "present")
    assert set(second.values()) == {(None, "null")}


# 6 and 7. Late data and corrections.


@pytest.mark.parametrize("known_only", [True, False])
def test_06_late_data_offline(engine: Any, known_only: bool, tmp_path: Path) -> None:
    rows = [row(10), row(20, 500, price=2.0), row(15, 30, price=3.0), row(20, 25, price=4.0)]
    labels = [label(at) for at in (9, 10, 19, 20, 24, 25, 30, 499, 500, 10**6)]
    check_join(engine, tmp_path, "item", rows, labels, known_only=known_only)
    store = stored(tmp_path, "item", rows)
    found = engine(FEATURES, "item", store, world.label_table(labels), known_only)
    due = [None, 10.0, 10.0, 10.0, 10.0, 4.0, 4.0, 4.0, 2.0, 2.0]
    anyway = [None, 10.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert [item["price"] for item in found] == (due if known_only else anyway)


@pytest.mark.parametrize("how", WAYS)
def test_06_the_cutoff_off_agrees_with_the_oracle(
    engine: Any, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    @many(examples(request, 10, 2))
    @given(_rows, _labels, st.sampled_from(list(TTLS)))
    def check(rows: Any, labels: Any, view: str) -> None:
        check_join(engine, tmp_path, view, rows, labels, how, known_only=False)

    check()


def test_06_many_late_rows_of_one_entity(engine: Any, tmp_path: Path) -> None:
    """All of an entity's rows were created late: each label steps back over all of them."""
    rows = [row(event, 10**9 + event) for event in range(300)]
    rows += [row(-1, -1, price=7.0)]
    check_join(engine, tmp_path, "item", rows, [label(at) for at in range(0, 400, 7)], "many")


def test_06_an_older_arrival_never_overwrites_online(open_store: Any) -> None:
    rows = [row(10, 10), row(9, 50, price=1.0), row(10, 9, price=2.0)]
    for number, order in enumerate(itertools.permutations(rows)):
        online = open_store(FEATURES, str(number))
        for item in order:
            online.write("item", [item])
        (found,) = online.look_up("item", [label(100)])
        assert found["price"] == (10.0, "present")


def test_06_late_rows_reach_incremental_materialisation(open_store: Any, tmp_path: Path) -> None:
    online = open_store(FEATURES)
    rows = [row(1000), row(1000, shelf=2)]
    store = stored(tmp_path, "item", rows)
    online.materialize(store, "item")
    late = [row(500, 2000, shelf=3), row(400, 2000, price=9.0), row(1500, 2000, shelf=2)]
    store.append("item", world.table(FEATURES, "item", late), 2000)
    online.materialize(store, "item")
    asked = [label(5000), label(5000, shelf=2), label(5000, shelf=3)]
    found = online.look_up("item", asked)
    assert [item["price"] for item in found] == [
        (1000.0, "present"),
        (1500.0, "present"),
        (500.0, "present"),
    ]
    assert online.materialize(store, "item") == 0
    assert_statuses(online.look_up("item", asked), found)


def test_07_both_stores_show_a_correction(engine: Any, open_store: Any, tmp_path: Path) -> None:
    online = open_store(FEATURES)
    store = stored(tmp_path, "item", [row(10, 10, note="wrong")])
    online.materialize(store, "item")
    store.append("item", world.table(FEATURES, "item", [row(10, 20, note="right")]), 20)
    online.materialize(store, "item")
    asked = [label(19), label(20), label(90)]
    found = engine(FEATURES, "item", store, world.label_table(asked))
    assert [item["note"] for item in found] == ["wrong", "right", "right"]
    assert [item["note"] for item in online.look_up("item", asked)] == [
        (None, "not found"),
        ("right", "present"),
        ("right", "present"),
    ]


# 8. Time.


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York", "+05:30"])
def test_08_labels_of_any_unit_and_zone_are_the_same_moments(
    engine: Any, unit: str, zone: str | None, tmp_path: Path
) -> None:
    second = 1_000_000
    rows = [row(at * second) for at in (-86_400, -1, 0, 1, 1_700_000_000)]
    moments = [-86_401, -86_400, -2, -1, 0, 1, 2, 1_699_999_999, 1_700_000_000]
    store = stored(tmp_path, "item", rows)
    exact = [label(at * second) for at in moments]
    asked = world.label_table(exact)
    times = asked["at"].cast(pa.int64()).cast(pa.timestamp("us")).cast(pa.timestamp(unit))
    typed = times.cast(pa.int64()).cast(pa.timestamp(unit, tz=zone))
    changed = asked.set_column(asked.column_names.index("at"), "at", typed)
    due = oracle.join(exact, rows, KEYS["item"], NAMES)
    world.assert_equal(engine(FEATURES, "item", store, changed), due)


def test_08_parts_of_a_microsecond_never_see_the_future(engine: Any, tmp_path: Path) -> None:
    rows = [row(-1, price=1.0), row(0, price=2.0), row(1, price=3.0)]
    store = stored(tmp_path, "item", rows)
    asked = world.label_table([label(0)] * 6)
    nanoseconds = pa.array([-1001, -1000, -1, 0, 999, 1000], pa.int64()).cast(pa.timestamp("ns"))
    changed = asked.set_column(asked.column_names.index("at"), "at", nanoseconds)
    found = engine(FEATURES, "item", store, changed)
    assert [item["price"] for item in found] == [None, 1.0, 1.0, 2.0, 2.0, 3.0]


def test_08_the_hour_that_comes_twice_and_mixed_zones(engine: Any, tmp_path: Path) -> None:
    new_york = ZoneInfo("America/New_York")
    first = datetime(2013, 11, 3, 1, 30, tzinfo=new_york)
    again = first.replace(fold=1)
    rows = [
        row(to_us(first.astimezone(UTC)), price=1.0),
        row(to_us(again.astimezone(UTC)), price=2.0),
    ]
    moments = [
        first - timedelta(microseconds=1),
        first,
        again,
        first.astimezone(timezone(timedelta(hours=9))),
        again.astimezone(ZoneInfo("Asia/Kolkata")),
    ]
    store = stored(tmp_path, "item", rows)
    asked = world.label_table([label(0)] * len(moments))
    utc = [moment.astimezone(UTC) for moment in moments]
    local = pa.array(utc, pa.timestamp("us", tz="America/New_York"))
    changed = asked.set_column(asked.column_names.index("at"), "at", local)
    found = engine(FEATURES, "item", store, changed)
    assert [item["price"] for item in found] == [None, 1.0, 2.0, 1.0, 2.0]


def test_08_before_1970_online(open_store: Any) -> None:
    online = open_store(FEATURES)
    old = to_us(datetime(1901, 12, 13, tzinfo=UTC))
    online.write("item", [row(old, price=1.0), row(old - 1, old + 5, price=2.0), row(-1, shelf=2)])
    asked = [label(old), label(0), label(-1, shelf=2), label(-2, shelf=2)]
    assert [item["price"] for item in online.look_up("item", asked)] == [
        (1.0, "present"),
        (1.0, "present"),
        (-1.0, "present"),
        (None, "not found"),
    ]


# 9. Keys.

_PAIRS = [("1", "11"), ("11", "1"), ("", "111"), ("111", ""), ("1", "1\x001"), ("é", "e\u0301")]


def test_09_composite_keys_offline(engine: Any, tmp_path: Path) -> None:
    rows = [row(number, shop=shop, city=city) for number, (shop, city) in enumerate(_PAIRS)] + [
        row(50, shop=None, city="1"),
        row(51, shop="1", city=None),
    ]
    labels = [{"shop": shop, "city": city, "at": 99} for shop, city in _PAIRS]
    labels += [
        {"shop": None, "city": "1", "at": 99},
        {"shop": "1", "city": None, "at": 99},
        {"shop": None, "city": None, "at": 99},
        {"shop": "x" * 600, "city": "y", "at": 99},
    ]
    check_join(engine, tmp_path, "place", rows, labels, "buckets")
    store = stored(tmp_path, "place", rows, "compacted")
    found = engine(FEATURES, "place", store, world.label_table(labels))
    assert [item["stock"] for item in found] == [0, 1, 2, 3, 4, 5, None, None, None, None]


def test_09_composite_keys_online(open_store: Any) -> None:
    online = open_store(FEATURES)
    rows = [row(number, shop=shop, city=city) for number, (shop, city) in enumerate(_PAIRS)]
    rows += [row(50, shop=None, city="1"), row(7, shop="x" * 600, city="y")]
    online.write("place", rows)
    asked = [{"shop": shop, "city": city, "at": 99} for shop, city in _PAIRS]
    asked += [{"shop": None, "city": "1", "at": 99}, {"shop": "x" * 600, "city": "y", "at": 99}]
    found = [item["stock"] for item in online.look_up("place", asked)]
    due = [(number, "present") for number in range(len(_PAIRS))]
    assert found == [*due, (None, "not found"), (7, "present")]


def test_09_a_number_is_not_a_text(engine: Any, open_store: Any, tmp_path: Path) -> None:
    rows = {"number": [row(1, code=1)], "word": [row(2, code="1")]}
    labels = {"number": [{"code": 1, "at": 9}], "word": [{"code": "1", "at": 9}]}
    online = open_store(FEATURES)
    for view in rows:
        online.write(view, rows[view])
    for view, other in (("number", "word"), ("word", "number")):
        store = stored(tmp_path, view, rows[view])
        (found,) = engine(FEATURES, view, store, world.label_table(labels[view]))
        assert found["stock"] == rows[view][0]["event"]
        with pytest.raises(SchemaError, match="code"):
            engine(FEATURES, view, store, world.label_table(labels[other]))
        (found,) = online.look_up(view, labels[view])
        assert found["stock"] == (rows[view][0]["event"], "present")
        try:
            (wrong,) = online.look_up(view, labels[other])
        except MlopsRayError:
            continue
        assert wrong["stock"] == (None, "not found")


def test_09_hashes_tell_keys_apart() -> None:
    one, eleven = pa.array(["1"]), pa.array(["11"])
    assert key_hash([one, eleven])[0] != key_hash([eleven, one])[0]
    assert key_hash([pa.array([1])])[0] != key_hash([one])[0]
    assert key_hash([pa.array([None], pa.string())])[0] != key_hash([pa.array([""])])[0]
    texts = pa.array([f"entity {number}" for number in range(20_000)])
    assert len(np.unique(key_hash([texts]))) == 20_000
    share = np.bincount((key_hash([texts]) % np.uint64(16)).astype(int), minlength=16) / 20_000
    assert share.min() > 0.05
    assert share.max() < 0.075


def test_09_hashes_are_the_same_in_every_process_and_layout() -> None:
    code = """
import pyarrow as pa
from mlops_ray.features.definitions import define
from mlops_ray.features.keys import key_hash
from mlops_ray.features.lookup import OnlineLookup
texts = pa.array(["1", "11", "ünï", "", None, "long " * 50])
print(key_hash([texts, pa.array([1, -1, 2**62, 0, 5, None])]).tolist())
"""
    outputs = set()
    for seed in ("0", "1", "random"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        line = [sys.executable, "-c", code]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1
    texts = pa.chunked_array([["x", "a"], ["b", "a"]])
    laid_out = [texts, texts.combine_chunks().dictionary_encode(), texts.cast(pa.large_string())]
    first, *others = [key_hash([values]).tolist() for values in laid_out]
    assert all(other == first for other in others)
    assert key_hash([texts.slice(1)]).tolist() == first[1:]


# 10. Schema, backfill, and online = offline.


def with_columns(columns: Mapping[str, str], **more: Any) -> Features:
    views = {"item": FEATURES.views["item"].model_dump(mode="json") | {"columns": columns} | more}
    return world.declare(views=views)


_BEFORE = {"price": "float", "stock": "int"}
_AFTER = {"note": "string", "price": "float", "stock": "int", "open": "bool"}


def test_10_an_added_column_is_null_in_old_rows(
    engine: Any, open_store: Any, tmp_path: Path
) -> None:
    old, new = with_columns(_BEFORE), with_columns(_AFTER)
    first = world.open_offline(tmp_path, old)
    world.fill(first, old, "item", [row(10), row(10, shelf=2)])
    online = open_store(old)
    online.materialize(first, "item")
    second = world.open_offline(tmp_path, new)
    asked = [label(99), label(99, shelf=2)]
    after = [
        {"note": None, "price": 10.0, "stock": 10, "open": None},
        {"note": None, "price": 10.0, "stock": 10, "open": None},
    ]
    world.assert_equal(engine(new, "item", second, world.label_table(asked)), after)
    second.append("item", world.table(new, "item", [row(20)]), 20)
    after[0] = {"note": "n20", "price": 20.0, "stock": 20, "open": True}
    world.assert_equal(engine(new, "item", second, world.label_table(asked)), after)
    again = open_store(new)
    again.materialize(second, "item")
    fresh, old_row = again.look_up("item", asked)
    assert fresh == {name: (value, "present") for name, value in after[0].items()}
    assert old_row == {
        "note": (None, "null"),
        "price": (10.0, "present"),
        "stock": (10, "present"),
        "open": (None, "null"),
    }


def test_10_a_changed_type_is_refused_with_reason_and_fix(engine: Any, tmp_path: Path) -> None:
    old, new = with_columns(_BEFORE), with_columns({"price": "float", "stock": "string"})
    store = world.open_offline(tmp_path, old)
    world.fill(store, old, "item", [row(10)])
    changed = world.open_offline(tmp_path, new)
    rows = world.table(new, "item", [row(20, stock="20")])
    with pytest.raises(MlopsRayError, match="stock") as refused:
        changed.append("item", rows, 20)
    assert "version" in refused.value.fix
    with pytest.raises(MlopsRayError, match="stock"):
        engine(new, "item", changed, world.label_table([label(99)]))
    world.assert_equal(
        engine(old, "item", world.open_offline(tmp_path, old), world.label_table([label(99)])),
        [{"price": 10.0, "stock": 10}],
    )


def test_10_a_raised_version_has_rows_of_its_own(
    engine: Any, open_store: Any, tmp_path: Path
) -> None:
    old, new = with_columns(_BEFORE), with_columns({"price": "string"}, version=2)
    before, after = world.open_offline(tmp_path, old), world.open_offline(tmp_path, new)
    online = open_store(old)
    world.fill(before, old, "item", [row(10)])
    online.materialize(before, "item")
    asked = world.label_table([label(99)])
    assert engine(new, "item", after, asked) == [{"price": None}]
    switched = open_store(new)
    assert switched.look_up("item", [label(99)]) == [{"price": (None, "not found")}]
    world.fill(after, new, "item", [row(10, price="ten")])
    switched.materialize(after, "item")
    assert switched.look_up("item", [label(99)]) == [{"price": ("ten", "present")}]
    (found,) = open_store(old).look_up("item", [label(99)])
    assert found["price"] == (10.0, "present")
    assert engine(old, "item", before, asked)[0]["price"] == 10.0


def test_10_a_version_stays_what_it_was(engine: Any, tmp_path: Path) -> None:
    store = stored(tmp_path, "item", [row(10)])
    version = store.version("item")
    store.append("item", world.table(FEATURES, "item", [row(20)]), 20)
    store.compact("item")
    asked = world.label_table([label(99)])
    assert engine(FEATURES, "item", store, asked)[0]["stock"] == 20
    assert engine(FEATURES, "item", store, asked, version=version)[0]["stock"] == 10


def test_10_online_is_offline_at_the_same_instant(
    engine: Any, open_store: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = itertools.count()

    @many(examples(request, 10, 2))
    @given(_rows, _labels, st.sampled_from(list(TTLS)), st.sampled_from(WAYS))
    def check(rows: Any, labels: Any, view: str, how: str) -> None:
        after = [item | {"at": 31 + abs(item["at"]) % 12} for item in labels]
        store = stored(tmp_path, view, rows, how)
        online = open_store(FEATURES, str(next(count)))
        online.materialize(store, view)
        offline = engine(FEATURES, view, store, world.label_table(after))
        found = online.look_up(view, after)
        values = [{name: value for name, (value, _) in item.items()} for item in found]
        world.assert_equal(values, offline)

    check()


def test_10_a_pinned_manifest_gives_the_same_bytes_for_ever(on_ray: bool, tmp_path: Path) -> None:
    features = world.declare(offline={"buckets": 3})
    store = world.open_offline(tmp_path, features)
    rows = [row(event, shelf=event % 4, note=f"ü{event}") for event in range(40)]
    world.fill(store, features, "item", rows, "many")
    labels = label_source([label(at, shelf=at % 5) for at in range(0, 60, 3)])
    until = from_us(50)
    versions = FeatureVersions(
        versions={"item": store.version("item")}, tables={"item": store.table_id("item")}
    )
    made = make_training_set(features, "all", labels, store, versions, until, on_ray=on_ray)
    later = [row(event, 60, shelf=event % 4, note="later") for event in range(0, 40, 2)]
    early = [row(39, 40, shelf=shelf, note="corrected") for shelf in range(4)]
    store.append("item", world.table(features, "item", early), 40)
    store.append("item", world.table(features, "item", later), 60)
    store.compact("item")
    store.append("item", world.table(features, "item", [row(70, note="newest")]), 70)
    store.compact("item")
    assert store.vacuum("item", retention=timedelta(0))
    raised = FEATURES.views["item"].model_dump(mode="json") | {"version": 2}
    new = world.declare(views={"item": raised})
    world.fill(world.open_offline(tmp_path, new), new, "item", rows[:5])
    manifest = read_manifest(store.root, made.manifest.id)
    assert manifest == made.manifest
    again = world.open_offline(tmp_path, features)
    grown = pa.concat_tables([labels, label_source([label(51), label(52)])])
    same = training_set_of(manifest, features, grown, again, on_ray=on_ray)
    assert same.equals(made.table)
    assert digest_table(same) == digest_table(made.table) == manifest.result
    now, _ = build_training_set(features, "all", labels, again, {}, until, on_ray=on_ray)
    assert not now.equals(made.table)
    with pytest.raises(MlopsRayError, match="labels"):
        training_set_of(manifest, features, labels.slice(2), again, on_ray=on_ray)


def test_10_other_code_replaces_all_rows_at_once(
    engine: Any, open_store: Any, tmp_path: Path
) -> None:
    store = stored(tmp_path, "item", [row(10, note="old"), row(10, shelf=2, note="old")])
    before = store.version("item")
    online = open_store(FEATURES)
    online.materialize(store, "item")
    store.append("item", world.table(FEATURES, "item", [row(10, note="new")]), 20, "other code")
    asked = [label(99), label(99, shelf=2)]
    found = engine(FEATURES, "item", store, world.label_table(asked))
    assert [item["note"] for item in found] == ["new", None]
    old = engine(FEATURES, "item", store, world.label_table(asked), version=before)
    assert [item["note"] for item in old] == ["old", "old"]
    online.materialize(store, "item")
    assert [item["note"] for item in online.look_up("item", asked)] == [
        ("new", "present"),
        (None, "not found"),
    ]


def test_10_appending_again_after_a_kill_stores_nothing_twice(engine: Any, tmp_path: Path) -> None:
    """A writer that died after its commit, and does all of it once more."""
    store = stored(tmp_path, "item", [row(10), row(20)])
    version = store.version("item")
    again = OfflineStore(store.root, FEATURES)
    rows = [row(10), row(20), row(30)]
    assert again.append("item", world.table(FEATURES, "item", rows[:2]), 20) == version
    again.append("item", world.table(FEATURES, "item", rows), 30)
    assert sorted(again.read("item")["stock"].to_pylist()) == [10, 20, 30]


# All of it at once: many rows, hot entities, every way of storing, small files and pieces.


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut files, batches and jobs so small that few rows fill many of them."""
    monkeypatch.setattr("mlops_ray.features.files.GROUP_ROWS", 64)
    monkeypatch.setattr("mlops_ray.features.files.BATCH_ROWS", 50)
    monkeypatch.setattr("mlops_ray.features.join._JOB_LABELS", 200)
    monkeypatch.setattr("mlops_ray.features.offline._TAIL_ROWS", 700)


def drawn(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of 40 shelves, half of them of one; a third late, of which some very."""
    random_ = np.random.default_rng(seed)
    shelves = np.where(random_.random(count) < 0.5, 0, random_.integers(0, 40, count))
    events = random_.integers(-5000, 5000, count)
    late = np.where(random_.random(count) < 0.3, random_.integers(0, 3000, count), 0)
    late[random_.random(count) < 0.05] = 10**6
    seen: dict[tuple[int, int, int], dict[str, Any]] = {}
    for shelf, event, wait in zip(shelves.tolist(), events.tolist(), late.tolist(), strict=True):
        item = row(event, event + wait, shelf=shelf, price=float(len(seen)))
        if len(seen) % 7 == 0:
            item |= {"price": None, "note": None}
        seen[(shelf, event, event + wait)] = item
    return list(seen.values())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("known_only", [True, False])
@pytest.mark.parametrize("how", WAYS)
def test_00_many_rows_agree_with_duckdb(
    engine: Any, how: str, known_only: bool, tmp_path: Path
) -> None:
    rows = drawn(4000, 1)
    random_ = np.random.default_rng(2)
    shelves = np.where(random_.random(1500) < 0.6, 0, random_.integers(-2, 42, 1500))
    labels = [
        label(at, shelf=shelf)
        for at, shelf in zip(
            random_.integers(-5200, 9000, 1500).tolist(), shelves.tolist(), strict=True
        )
    ]
    asked = world.label_table(labels)
    for view, ttl in (("item", None), ("item_short", 10)):
        store = stored(tmp_path, view, rows, how)
        whole = world.table(FEATURES, view, rows)
        due = second_opinion.join(asked, whole, KEYS["item"], NAMES, ttl, known_only)
        found = engine(FEATURES, view, store, asked, known_only)
        world.assert_equal(found, due)
        assert sum(item["stock"] is not None for item in found) > 20
        # The same bits in another order of labels.
        shuffled = random_.permutation(len(labels))
        again = engine(FEATURES, view, store, asked.take(pa.array(shuffled)), known_only)
        world.assert_equal(again, [due[number] for number in shuffled])


def test_06_any_course_of_appends_reaches_the_online_store(
    open_store: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Appends, compactions, materialisations in any order; at the end both stores agree."""
    count = itertools.count()
    steps = st.lists(
        st.tuples(st.sampled_from(["append", "append", "compact", "materialize"]), _rows),
        min_size=2,
        max_size=8,
    )

    @many(examples(request, 12, 6))
    @given(steps, _labels)
    def check(course: Any, labels: Any) -> None:
        store = stored(tmp_path, "item", [])
        online = open_store(FEATURES, str(next(count)))
        kept: list[Mapping[str, Any]] = []
        for number, (action, rows) in enumerate(course, 1):
            if action == "append":
                # Later appends are created later; their events lie anywhere.
                later = [item | {"created": 100 * number + item["created"]} for item in rows]
                store.append("item", world.table(FEATURES, "item", later), 100 * number + 50)
                kept += later
            elif action == "compact":
                store.compact("item")
            else:
                online.materialize(store, "item")
        online.materialize(store, "item")
        after = [item | {"at": 10_000 + item["at"]} for item in labels]
        due = [oracle.look_up(item, kept, KEYS["item"], NAMES, None) for item in after]
        assert_statuses(online.look_up("item", after), due)
        assert online.materialize(store, "item") == 0

    check()


def test_09_a_hash_lies_on_disk_and_never_changes() -> None:
    texts = pa.array(["", "1", "north", "süd", "a text of more than eight bytes"])
    numbers = pa.array([0, 1, -1, 2**62, 5])
    assert key_hash([texts]).tolist() == HASHES_OF_TEXTS
    assert key_hash([numbers]).tolist() == HASHES_OF_NUMBERS
    assert key_hash([texts, numbers]).tolist() == HASHES_OF_BOTH


def on_demand(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the function was given: the types of the stored features, and their values."""
    stored_ = [inputs[f"item__{name}"] for name in NAMES]
    told = " ".join(str(values.dtype) for values in stored_)
    count = len(inputs["at"])
    return {
        "doubled": np.asarray(stored_[1], np.float64) * 2,
        "told": np.array([told] * count, object),
        "shown": np.array([str([values[n] for values in stored_]) for n in range(count)], object),
    }


@pytest.mark.parametrize("nulls", [False, True])
def test_10_a_request_gets_what_training_got(
    on_ray: bool, open_store: Any, tmp_path: Path, nulls: bool
) -> None:
    """A service with an on-demand view over stored features of all types."""
    service = FEATURES.services["all"].model_dump(mode="json") | {"on_demand": ["shown"]}
    view = {
        "function": "contract.test_feature_store_contract.on_demand",
        "features": [f"item__{name}" for name in NAMES],
        "numeric": ["doubled"],
        "categorical": ["told", "shown"],
    }
    features = world.declare(services={"all": service}, on_demand={"shown": view})
    rows = [row(5, stock=2**40), row(6, shelf=2, open=False)]
    rows += [row(7, shelf=3, **dict.fromkeys(NAMES))] if nulls else []
    shelves = [1, 2, 3, 4] if nulls else [1, 2]
    store = stored(tmp_path, "item", rows)
    labels = label_source([label(50, shelf=shelf) for shelf in shelves])
    table, _ = build_training_set(features, "all", labels, store, {}, None, on_ray=on_ray)
    online = open_store(features)
    online.materialize(store, "item")
    requests = inputs_of(table.select(["shop", "shelf", "at"]), features.services["all"])
    served = OnlineLookup(online.features, "all", online.store)(requests)
    for name in feature_columns(features, "all")[0]:
        trained = table[name].cast(pa.float64()).to_numpy()
        np.testing.assert_array_equal(served[name], trained, err_msg=name)
    for name in feature_columns(features, "all")[1]:
        assert served[name].tolist() == table[name].to_pylist(), name


KILLED = """
import os, sys, pyarrow.parquet as pq
from pathlib import Path
from contract import world
from mlops_ray.features.online import open_online
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline

root, rows = Path(sys.argv[1]), pq.read_table(sys.argv[2])
features = world.declare()
pipeline = FeaturePipeline(
    features, {"rows": rows}, OfflineStore(root / "offline", features),
    open_online(features, root / "online", "killed"), views=["item", "place"], spread_rows=100,
)
print("begin", flush=True)
pipeline.advance(pipeline.newest)
print("end", flush=True)
"""


def test_10_a_killed_backfill_and_its_rerun_change_nothing(tmp_path: Path) -> None:
    """A backfill on disk, killed at five moments, ends where an undisturbed one does."""
    count = 20_000
    random_ = np.random.default_rng(3)
    events = random_.integers(0, 10**9, count)
    source = pa.table(
        {
            "shop": [f"s{number}" for number in random_.integers(0, 50, count)],
            "city": [f"c{number}" for number in random_.integers(0, 50, count)],
            "shelf": random_.integers(0, 50, count),
            "event": pa.array(events).cast(pa.timestamp("us")),
            "created": pa.array(events + random_.integers(0, 10**6, count)).cast(
                pa.timestamp("us")
            ),
            "price": random_.normal(size=count),
            "stock": random_.integers(0, 9, count),
            "open": random_.random(count) < 0.5,
            "note": [f"n{number % 100}" for number in range(count)],
            "since": pa.array(events).cast(pa.timestamp("us")),
        }
    )
    pq.write_table(source, tmp_path / "rows.parquet")
    undisturbed = run_backfill(tmp_path / "whole", tmp_path)
    for share in (0.1, 0.4, 0.6, 0.8, 0.95):
        run_backfill(tmp_path / "killed", tmp_path, undisturbed * share)
    run_backfill(tmp_path / "killed", tmp_path)
    whole, killed = (world.open_offline(tmp_path / name, FEATURES) for name in ("whole", "killed"))
    for view in ("item", "place"):
        keys = [(name, "ascending") for name in define(FEATURES, view).schema.names]
        one, other = (store.read(view).sort_by(keys) for store in (whole, killed))
        assert one.num_rows > 0.99 * count
        assert one.equals(other)
        stores = [
            open_online(FEATURES, tmp_path / name / "online", "killed", readonly=True)
            for name in ("whole", "killed")
        ]
        asked = [one[name].slice(0, 500).to_numpy() for name in KEYS[view]]
        tables = [s.reader([view]).read_table([asked], np.full(500, 10**12))[0] for s in stores]
        assert tables[0].equals(tables[1])
        assert tables[0][f"{view}__stock"].null_count == 0


def run_backfill(root: Path, folder: Path, seconds: float | None = None) -> float:
    """Run a backfill to its end, or kill it so many seconds after it began; return how long it ran."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-c", KILLED, str(root), str(folder / "rows.parquet")]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        begun = time.monotonic()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return time.monotonic() - begun
        assert process.stdout.readline() == "end\n"
        return time.monotonic() - begun
