"""What every store and every join engine owes, points 1 to 5: which row counts, and all labels stay.

The oracle (``oracle.py``) is plain Python; DuckDB gives a second opinion on it. The other points are
in the files beside this one.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from contract import oracle, second_opinion, world
from contract.checks import (
    FEATURES,
    LABELS,
    ROWS,
    WAYS,
    assert_statuses,
    check_join,
    examples,
    label_source,
    many,
    stored,
)
from contract.world import KEYS, NAMES, TTLS, label, row
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.features.files import buckets_of
from mlops_ray.features.training_set import build_training_set

# 1. Duplicates of (entity, event time): the newest created wins.


@pytest.mark.parametrize("how", WAYS)
def test_01_the_newest_created_of_duplicates_wins_offline(
    engine: Any, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    @many(examples(request, 12, 2))
    @given(ROWS, LABELS, st.randoms(), st.sampled_from([1, 4, 16]))
    def check(rows: Any, labels: Any, shuffle: random.Random, buckets: int) -> None:
        shuffle.shuffle(rows)
        check_join(engine, tmp_path, "item", rows, labels, how, buckets=buckets)

    check()


def test_01_the_newest_created_of_duplicates_wins_online(
    open_store: Any, request: pytest.FixtureRequest
) -> None:
    count = itertools.count()

    @many(examples(request, 25, 12))
    @given(ROWS, LABELS, st.randoms(), st.integers(1, 4))
    def check(rows: Any, labels: Any, shuffle: random.Random, parts: int) -> None:
        shuffle.shuffle(rows)
        online = open_store(FEATURES, str(next(count)))
        for part in np.array_split(np.arange(len(rows)), parts):
            online.write("item", [rows[number] for number in part])
        due = [oracle.look_up(item, rows, KEYS["item"], NAMES, None) for item in labels]
        assert_statuses(online.look_up("item", labels), due)

    check()


def test_01_a_correction_is_seen_from_its_created_time_on(engine: Any, tmp_path: Path) -> None:
    rows = [row(5, 5, price=1.0), row(5, 6, price=2.0)]
    store = stored(tmp_path, "item", rows[:1])
    store.append("item", world.table(FEATURES, "item", rows[1:]), 6)
    found = engine(FEATURES, "item", store, world.label_table([label(5), label(6)]))
    assert [item["price"] for item in found] == [1.0, 2.0]


def test_01_of_rows_with_equal_times_the_one_written_last_counts(
    engine: Any, open_store: Any, tmp_path: Path
) -> None:
    store = stored(tmp_path, "item", [])
    written = [world.table(FEATURES, "item", [row(5, 5, note=note)]) for note in "abc"]
    bucket = int(buckets_of(written[0], ["shop", "shelf"], store.buckets("item"))[0])
    files = [store.write_bucket("item", bucket, rows) for rows in written]
    store.commit("item", files, 5)
    asked = world.label_table([label(5)])
    assert engine(FEATURES, "item", store, asked)[0]["note"] == "c"
    online = open_store(FEATURES)
    online.materialize(store, "item")
    assert online.look_up("item", [label(5)])[0]["note"] == ("c", "present")
    world.compact(store, "item")
    assert store.read("item").num_rows == 3
    assert engine(FEATURES, "item", store, asked)[0]["note"] == "c"


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


# All of it at once: many rows, hot entities, every way of storing, small files and pieces.


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


@pytest.mark.parametrize("known_only", [True, False])
@pytest.mark.parametrize("how", WAYS)
def test_00_many_rows_agree_with_duckdb(
    engine: Any, how: str, known_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = drawn(1500, 1)
    random_ = np.random.default_rng(2)
    shelves = np.where(random_.random(500) < 0.6, 0, random_.integers(-2, 42, 500))
    labels = [
        label(at, shelf=shelf)
        for at, shelf in zip(
            random_.integers(-5200, 9000, 500).tolist(), shelves.tolist(), strict=True
        )
    ]
    asked = world.label_table(labels)
    monkeypatch.setattr("mlops_ray.features.files.GROUP_ROWS", 64)
    monkeypatch.setattr("mlops_ray.features.join._JOB_LABELS", 200)
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
