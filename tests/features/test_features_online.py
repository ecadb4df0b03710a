"""What every online store promises."""

from __future__ import annotations

import itertools
import math
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from features.online_samples import (
    HOUR_US,
    TYPED,
    VALUES,
    Opener,
    declare,
    get,
    keys,
    open_store,
    put,
    redis_server,
    row,
    table,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.definitions import define
from mlops_ray.features.online import EXPIRED, NOT_FOUND, NULL, PRESENT, Cursor

__all__ = ["open_store", "redis_server"]

FEATURES = declare()
COUNT = len(TYPED)
EXTREMES = [-(2**63), -(2**53) - 1, -1, 0, 2**53 + 1, 2**63 - 1]


def test_every_type_comes_back_exactly(open_store: Opener) -> None:
    store = open_store(FEATURES)
    for number, whole in enumerate(EXTREMES):
        instant = max(whole, -(2**63) + 1)
        values = {
            "price": [math.nan, math.inf, -0.0, 5e-324, 1.0, 2.0][number],
            "stock": whole,
            "note": ["", "süß 🎈", "\x00", "a" * 1000, "b", "c"][number],
            "open": whole % 2 == 0,
            "seen": instant,
            "colour": ["x" * number, ""][number % 2],
        }
        put(store, FEATURES, row(0, **values))
        found, statuses = get(store, 10)
        assert statuses == [PRESENT] * COUNT
        assert repr(found) == repr(values)


def test_statuses_and_nulls(open_store: Opener) -> None:
    store = open_store(FEATURES)
    put(store, FEATURES, row(100, **(VALUES | {"stock": None, "note": None, "seen": None})))
    found, statuses = get(store, 100)
    assert statuses == [PRESENT, NULL, NULL, PRESENT, NULL, PRESENT]
    assert found == VALUES | {"stock": None, "note": None, "seen": None}
    for key in (("north", 2), ("süd", 1), (None, 1)):
        found, statuses = get(store, 100, key)
        assert statuses == [NOT_FOUND] * COUNT
        assert set(found.values()) == {None}


@pytest.mark.parametrize(("ttl", "ttl_us"), [("12h", 12 * HOUR_US), ("0s", 0), (None, None)])
def test_ttl_edges(open_store: Opener, ttl: str | None, ttl_us: int | None) -> None:
    features = declare(ttl=ttl)
    store = open_store(features)
    put(store, features, row(-100))
    assert get(store, -100)[1] == [PRESENT] * COUNT
    assert get(store, -101)[1] == [NOT_FOUND] * COUNT
    if ttl_us is None:
        assert get(store, 2**62)[1] == [PRESENT] * COUNT
        return
    assert get(store, -100 + ttl_us)[1] == [PRESENT] * COUNT
    found, statuses = get(store, -100 + ttl_us + 1)
    assert statuses == [EXPIRED] * COUNT
    assert set(found.values()) == {None}


def test_what_lies_after_the_moment_is_not_used(open_store: Opener) -> None:
    store = open_store(FEATURES)
    put(store, FEATURES, row(100, 150))
    assert get(store, 150)[1] == [PRESENT] * COUNT
    assert get(store, 149)[1] == [NOT_FOUND] * COUNT
    assert get(store, 99)[1] == [NOT_FOUND] * COUNT


def test_newest_wins_in_any_order_of_arrival(open_store: Opener) -> None:
    rows = [row(100, 100), row(-200, 210), row(200, 210, price=2.0), row(200, 220, price=3.0)]
    rows.append(row(150, 900))
    features = declare(ttl=None)
    for number, order in enumerate(itertools.permutations(range(5))):
        store = open_store(features, "one")
        key = ("north", number)
        for at in order:
            put(store, features, rows[at] | {"shelf": number})
        assert get(store, 1000, key)[0]["price"] == 3.0


def test_an_older_row_is_not_kept_and_an_equal_one_is(open_store: Opener) -> None:
    store = open_store(FEATURES)
    assert put(store, FEATURES, row(2**61, 2**61 + 1, price=1.0)) == 1
    assert put(store, FEATURES, row(2**61, 2**61, price=2.0)) == 0
    assert put(store, FEATURES, row(2**61 - 1, 2**61 + 9, price=2.0)) == 0
    assert put(store, FEATURES, row(2**61, 2**61 + 1, price=3.0)) == 1
    assert get(store, 2**62)[0]["price"] is None
    assert get(store, 2**61 + 1)[0]["price"] == 3.0


def test_rows_without_a_key_are_skipped(open_store: Opener) -> None:
    store = open_store(FEATURES)
    assert put(store, FEATURES, row(1, key=(None, 1)), row(1, key=("a", None))) == 0
    # 2^53 + 1 would not survive as a float, which a column with a null easily becomes.
    assert put(store, FEATURES, row(1, key=("a", 2**53 + 1)), row(1, key=("a", None))) == 1
    assert get(store, 1, ("a", 2**53 + 1))[1] == [PRESENT] * COUNT


def test_more_features_than_a_word_has_bits(open_store: Opener) -> None:
    names = [f"f{number}" for number in range(130)]
    features = declare(names)
    store = open_store(features)
    values = {name: None if at % 3 else float(at) for at, name in enumerate(names)}
    put(store, features, row(1, **values))
    for key in (("north", 1), ("north", 2)):
        found, statuses = store.read_matrix("thing", keys(key, key), np.array([5, 0]))
        alone, single = store.read_matrix("thing", keys(key), np.array([5]))
        np.testing.assert_array_equal(found[:1], alone)
        np.testing.assert_array_equal(statuses[:1], single)
        assert (statuses[1] == NOT_FOUND).all()
        assert np.isnan(found[1]).all()
    found, statuses = store.read_matrix("thing", keys(("north", 1)), np.array([5]))
    assert statuses[0].tolist() == [NULL if at % 3 else PRESENT for at in range(130)]
    assert [v for v in found[0] if v == v] == [float(at) for at in range(0, 130, 3)]


_moments = st.integers(-40, 40)
_value_rows = st.fixed_dictionaries(
    {
        "shop": st.sampled_from(["north", "süd", "", None]),
        "shelf": st.sampled_from([1, -1, 2**53 + 1]),
        "event_time": _moments,
        "created_time": _moments,
        "price": st.none() | st.floats(allow_nan=True),
        "stock": st.none() | st.sampled_from(EXTREMES),
        "note": st.none() | st.text(max_size=5),
        "open": st.none() | st.booleans(),
        "seen": st.none() | st.integers(-(2**40), 2**40),
        "colour": st.none() | st.sampled_from(["", "red", "grün"]),
    }
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(_value_rows, min_size=1, max_size=25), at=_moments, data=st.data())
def test_all_ways_of_reading_agree_with_brute_force(
    open_store: Opener, rows: list[dict[str, Any]], at: int, data: st.DataObject
) -> None:
    features = declare(ttl="0.00001s")
    store = open_store(features)
    store.clear()
    start = 0
    while start < len(rows):
        count = data.draw(st.integers(1, 10))
        put(store, features, *rows[start : start + count])
        start += count
    asked = [(r["shop"], r["shelf"]) for r in rows] + [("none", 1)]
    moments = np.array([at + number for number in range(len(asked))])
    due = [_brute_force(rows, key, moment) for key, moment in zip(asked, moments, strict=True)]
    _check(store, asked, moments, due)
    for number, key in enumerate(asked):
        _check(store, [key], moments[number : number + 1], due[number : number + 1])


def _brute_force(rows: list[Any], key: Any, at: int) -> list[tuple[int, Any]]:
    mine = [r for r in rows if (r["shop"], r["shelf"]) == key and key[0] is not None]
    if not mine:
        return [(NOT_FOUND, None)] * COUNT
    # Of equal rows the last one stays, which sorting keeps last.
    newest = sorted(mine, key=lambda r: (r["event_time"], r["created_time"]))[-1]
    if max(newest["event_time"], newest["created_time"]) > at:
        return [(NOT_FOUND, None)] * COUNT
    if at - newest["event_time"] > 10:
        return [(EXPIRED, None)] * COUNT
    return [(NULL if newest[n] is None else PRESENT, newest[n]) for n in TYPED]


def _check(store: Any, asked: list[Any], moments: Any, due: list[Any]) -> None:
    reader = store.reader(["thing"])
    found, statuses = reader.read_table([keys(*asked)], moments)
    assert statuses.tolist() == [[status for status, _ in row] for row in due]
    schema = define(FEATURES, "thing").schema
    columns = reader.read_columns([keys(*asked)], moments)
    assert list(reader.names) == found.column_names
    others = [name for name in reader.names if name not in reader.numeric_names]
    assert list(columns) == [*reader.numeric_names, *others]
    for place, name in enumerate(TYPED):
        values = [row[place][1] for row in due]
        exact = found[f"thing__{name}"]
        assert exact.type == schema.field(name).type
        if name == "seen":
            exact = exact.cast(pa.int64())
        assert repr(exact.to_pylist()) == repr(values)
        column = columns[f"thing__{name}"]
        if name in ("note", "colour"):
            assert column.tolist() == values
        elif name == "seen":
            absent = np.iinfo(np.int64).min
            assert column.dtype == "datetime64[us]"
            assert column.view(np.int64).tolist() == [absent if v is None else v for v in values]
        else:
            expected = np.array([np.nan if v is None else v for v in values], np.float64)
            np.testing.assert_array_equal(column, expected)
    matrix, numeric = reader.read([keys(*asked)], moments)
    assert reader.numeric_names == ("thing__price", "thing__stock", "thing__open")
    expected = np.column_stack([columns[name] for name in reader.numeric_names])
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(reader.read_values([keys(*asked)], moments), expected)
    np.testing.assert_array_equal(numeric, statuses[:, [0, 1, 3]])


def test_a_reader_of_many_views_sees_what_single_reads_see(open_store: Opener) -> None:
    store = open_store(FEATURES)
    random = np.random.default_rng(0)
    shops, shelves = ["north", "süd", "ost"], [1, 2, 3]
    for shop, shelf in itertools.product(shops, shelves):
        if random.random() < 0.7:
            put(store, FEATURES, row(int(random.integers(0, 99)), key=(shop, shelf)))
    plain = [
        {"shelf": s, "event_time": s, "created_time": s, "a": float(s), "b": None} for s in (1, 3)
    ]
    store.write("plain", table(FEATURES, "plain", plain))
    word = {"shop": "süd", "event_time": 50, "created_time": 50, "word": "wörd"}
    store.write("name", table(FEATURES, "name", [word]))
    pairs = list(itertools.product([*shops, None], [*shelves, 4]))
    moments = np.full(len(pairs), 50)
    shop, shelf = keys(*pairs)
    views = {"name": [shop], "thing": [shop, shelf], "plain": [shelf]}
    reader = store.reader(list(views))
    together, statuses = reader.read_table(list(views.values()), moments)
    alone = [store.reader([view]).read_table([given], moments) for view, given in views.items()]
    assert together.to_pylist() == [
        {k: v for part in parts for k, v in part.items()}
        for parts in zip(*(t.to_pylist() for t, _ in alone), strict=True)
    ]
    np.testing.assert_array_equal(statuses, np.hstack([s for _, s in alone]))
    assert set(statuses[:, 0].tolist()) == {PRESENT, NOT_FOUND}
    matrix, _ = reader.read(list(views.values()), moments)
    for at in range(len(pairs)):
        given = [[column[at : at + 1] for column in columns] for columns in views.values()]
        single, _ = reader.read(given, moments[:1])
        np.testing.assert_array_equal(single[0], matrix[at])
    empty = [[column[:0] for column in columns] for columns in views.values()]
    assert reader.read_values(empty, moments[:0]).shape == (0, matrix.shape[1])


def test_an_added_column_is_null_in_older_rows_and_a_dropped_one_unread(
    open_store: Opener,
) -> None:
    old = declare({"price": "float", "note": "string"}, ttl=None)
    new = declare({"note": "string", "stock": "int", "price": "float"}, ttl=None)
    before, after = open_store(old), open_store(new)
    put(before, old, row(5, price=1.0, note="süß"), row(6, key=("süd", 1), price=None, note=None))
    assert get(after, 9) == (
        {"note": "süß", "stock": None, "price": 1.0},
        [PRESENT, NULL, PRESENT],
    )
    assert get(after, 9, ("süd", 1))[1] == [NULL, NULL, NULL]
    put(after, new, row(7, price=2.0, note="neu", stock=4))
    assert put(before, old, row(6, price=3.0, note="x")) == 0
    assert get(before, 9) == ({"price": 2.0, "note": "neu"}, [PRESENT, PRESENT])
    both = keys(("north", 1), ("süd", 1), ("west", 1))
    found = after.reader(["thing"]).read_table([both], np.full(3, 9))[0]
    assert found["thing__note"].to_pylist() == ["neu", None, None]
    assert found["thing__stock"].to_pylist() == [4, None, None]


def test_rows_of_two_definitions_lie_side_by_side(open_store: Opener) -> None:
    store = open_store(FEATURES)
    put(store, FEATURES, row(100))
    view = FEATURES.views["thing"].model_copy(update={"version": 2})
    changed = FEATURES.model_copy(update={"views": FEATURES.views | {"thing": view}})
    other = open_store(changed)
    assert get(other, 100)[1] == [NOT_FOUND] * COUNT
    put(other, changed, row(50, price=9.0))
    assert get(other, 100)[0]["price"] == 9.0
    assert get(store, 100)[0]["price"] == 1.5


def test_a_batch_is_seen_at_once_or_not_at_all(open_store: Opener) -> None:
    store, reader = open_store(FEATURES), open_store(FEATURES, readonly=True)
    put(store, FEATURES, row(1, key=("other", 1)))
    moved = Cursor("table", 3, 100, "g")

    def fail() -> None:
        with store.batch():
            put(store, FEATURES, row(100))
            store.move_cursor("thing", moved)
            assert store.cursor("thing") == moved
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert get(store, 100)[1] == [NOT_FOUND] * COUNT
    assert store.cursor("thing") is None
    with store.batch(), store.batch():
        put(store, FEATURES, row(100, price=1.0), row(101, price=2.0))
        put(store, FEATURES, row(99, price=3.0))
        store.move_cursor("thing", moved)
        assert get(reader, 200)[1] == [NOT_FOUND] * COUNT
        assert reader.cursor("thing") is None
    assert get(reader, 200)[0]["price"] == 2.0
    assert reader.cursor("thing") == moved


def test_the_cursor_never_moves_back_for_rows_of_one_making(open_store: Opener) -> None:
    store = open_store(FEATURES)
    steps = [
        (Cursor("", -1, -7, "g"), Cursor("", -1, -7, "g")),
        (Cursor("t", 0, None, "g"), Cursor("t", 0, -7, "g")),
        (Cursor("t", 4, 2**60, "g"), Cursor("t", 4, 2**60, "g")),
        (Cursor("t", 3, 1, "g"), Cursor("t", 4, 2**60, "g")),
        (Cursor("t", 5, 1, "h"), Cursor("t", 5, 1, "h")),
        (Cursor("u", 0, 0, "h"), Cursor("u", 0, 0, "h")),
    ]
    for moved, due in steps:
        store.move_cursor("thing", moved)
        assert store.cursor("thing") == due
    assert store.cursor("plain") is None


def test_a_replacement_is_seen_at_its_end(open_store: Opener) -> None:
    store, reader = open_store(FEATURES), open_store(FEATURES, readonly=True)
    put(store, FEATURES, row(100, price=1.0), row(1, key=("gone", 1)))
    seen = []

    def tables() -> Any:
        yield table(FEATURES, "thing", [row(7, price=7.0), row(5, price=5.0)])
        seen.append(get(reader, 1000)[0]["price"])
        yield table(FEATURES, "thing", [row(6, price=6.0), row(8, key=("new", 1))])
        seen.append(get(reader, 1000)[0]["price"])

    cursor = Cursor("t", 1, 8, "g")
    assert store.replace("thing", tables(), cursor) == 2
    assert seen == [1.0, 1.0]
    assert get(reader, 1000)[0]["price"] == 7.0
    assert get(reader, 1000, ("gone", 1))[1] == [NOT_FOUND] * COUNT
    assert get(reader, 1000, ("new", 1))[1] == [PRESENT] * COUNT
    filled = reader.cursor("thing")
    assert filled is not None
    assert replace(filled, filling="") == cursor
    assert filled.filling
    store.replace("thing", [], Cursor("t", 2))
    assert get(reader, 1000)[1] == [NOT_FOUND] * COUNT


def test_a_replacement_that_fails_leaves_what_was_there(open_store: Opener) -> None:
    store = open_store(FEATURES)
    put(store, FEATURES, row(100, price=1.0))

    def tables() -> Any:
        yield table(FEATURES, "thing", [row(200, price=7.0)])
        raise KeyError

    with pytest.raises(KeyError):
        store.replace("thing", tables(), Cursor("t", 1))
    assert get(store, 1000)[0]["price"] == 1.0
    assert store.cursor("thing") is None
    put(store, FEATURES, row(101, price=2.0))
    assert store.replace("thing", [table(FEATURES, "thing", [row(1)])], Cursor("t", 1)) == 1
    assert get(store, 1000)[0]["price"] == 1.5


def test_many_rows_at_once(open_store: Opener) -> None:
    """More than one slice of rows, several of each entity, in no order."""
    count, things = 40_000, 9_000
    random = np.random.default_rng(0)
    shelf, event = random.integers(0, things, count), random.integers(0, 500, count)
    created = np.arange(count) + 1000
    instant = pa.timestamp("us", tz="UTC")
    rows = pa.table(
        {
            "shelf": shelf,
            "event_time": pa.array(event).cast(instant),
            "created_time": pa.array(created).cast(instant),
            "a": created.astype(float),
            "b": pa.nulls(count, pa.float64()),
        }
    )
    order = np.lexsort((created, event, shelf))
    last = order[np.append(shelf[order][1:] != shelf[order][:-1], True)]
    for name, chosen in (("mixed", rows), ("sorted", rows.take(pa.array(order)))):
        for way in ("write", "replace"):
            store = open_store(FEATURES, f"{name}-{way}")
            if way == "write":
                store.write("plain", chosen)
            else:
                parts = [chosen.slice(start, 15_000) for start in range(0, count, 15_000)]
                store.replace("plain", parts, Cursor())
            found, _ = store.read_matrix("plain", [shelf[last]], np.full(len(last), 10**6))
            np.testing.assert_array_equal(found[:, 0], created[last])


def test_another_process_reads_what_this_one_writes(open_store: Opener, tmp_path: Path) -> None:
    store = open_store(FEATURES)
    put(store, FEATURES, row(0, key=("a", 1)))
    (tmp_path / "open.pkl").write_bytes(pickle.dumps(open_store.arguments(FEATURES)))
    code = f"""
import pickle, sys, numpy as np
from pathlib import Path
from mlops_ray.features.online import open_online
store = open_online(*pickle.loads(Path({str(tmp_path / "open.pkl")!r}).read_bytes()), readonly=True)
reader = store.reader(["thing"])
for line in sys.stdin:
    key = [np.array(["süd"], object), np.array([3])]
    print(reader.read([key], np.array([500]))[0][0, 0], flush=True)
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    for value in (1.0, 2.0):
        put(store, FEATURES, row(int(value), key=("süd", 3), price=value))
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert float(reader.stdout.readline()) == value
    reader.stdin.close()
    assert reader.wait(timeout=30) == 0


def test_cleared_in_place_readers_see_it_empty(open_store: Opener) -> None:
    store, other = open_store(FEATURES), open_store(FEATURES, "other")
    reader = open_store(FEATURES, readonly=True)
    for each in (store, other):
        put(each, FEATURES, row(100))
        each.move_cursor("thing", Cursor("t", 1))
    store.clear()
    assert get(reader, 100)[1] == [NOT_FOUND] * COUNT
    assert reader.cursor("thing") is None
    put(store, FEATURES, row(50, price=3.0))
    assert get(reader, 100)[0]["price"] == 3.0
    assert get(other, 100)[0]["price"] == 1.5
    assert other.cursor("thing") == Cursor("t", 1)


def test_errors(open_store: Opener) -> None:
    store = open_store(FEATURES)
    with pytest.raises(FeatureStoreError, match="no feature view 'thin'"):
        store.read_matrix("thin", keys(("a", 1)), np.array([1]))
    with pytest.raises(FeatureStoreError, match="do not fit view 'thing'"):
        store.write("thing", table(FEATURES, "plain", []))
    wrong = table(FEATURES, "thing", [row(1)]).set_column(3, "created_time", [["x"]])
    with pytest.raises(FeatureStoreError, match="do not fit view 'thing'"):
        store.write("thing", wrong)
    timeless = table(FEATURES, "thing", [row(1) | {"created_time": None}])
    with pytest.raises(FeatureStoreError, match="has no created_time"):
        store.write("thing", timeless)
    with pytest.raises(FeatureStoreError, match="string or a whole number"):
        store.read_matrix("plain", [np.array([1.5])], np.array([1]))
    assert get(store, 1)[1] == [NOT_FOUND] * COUNT
    put(store, FEATURES, row(1))
    reader = open_store(FEATURES, readonly=True)
    for change in (
        lambda: put(reader, FEATURES, row(1)),
        lambda: reader.replace("thing", [], Cursor()),
        lambda: reader.move_cursor("thing", Cursor()),
        reader.clear,
    ):
        with pytest.raises(FeatureStoreError, match="open for reading"):
            change()


def test_a_cursor_stays_when_the_rows_that_it_speaks_of_were_replaced(open_store: Opener) -> None:
    store, other = open_store(FEATURES), open_store(FEATURES)
    assert store.move_cursor("thing", Cursor("t", 1, 5, "g"))
    mine = store.cursor("thing")
    assert mine is not None
    # The same cursor again, yet other rows.
    other.replace("thing", [], mine)
    filled = store.cursor("thing")
    assert not store.move_cursor("thing", replace(mine, version=2))
    assert store.cursor("thing") == filled
    assert filled is not None
    assert store.move_cursor("thing", replace(filled, version=2))
    with store.batch():
        store.move_cursor("thing", replace(filled, version=3))
        store.move_cursor("thing", replace(filled, version=4))
    assert store.cursor("thing") == replace(filled, version=4)
    store.clear()
    assert not store.move_cursor("thing", replace(filled, version=5))
    assert store.cursor("thing") is None


def test_a_view_is_not_replaced_inside_a_batch(open_store: Opener) -> None:
    store = open_store(FEATURES)
    put(store, FEATURES, row(1, price=2.0))
    with pytest.raises(FeatureStoreError, match="inside a batch"), store.batch():
        store.replace("thing", [], Cursor())
    assert get(store, 9)[0]["price"] == 2.0


def test_a_batch_is_of_one_thread(open_store: Opener) -> None:
    store = open_store(FEATURES)
    inside, other_done = threading.Event(), threading.Event()

    def fails() -> None:
        with store.batch():
            put(store, FEATURES, row(1, key=("batch", 1)))
            inside.set()
            # A store with one writer at a time lets the other wait until this ends.
            other_done.wait(0.3)
            raise KeyError

    def writes() -> int:
        inside.wait(10)
        written = put(store, FEATURES, row(1, key=("other", 1)))
        other_done.set()
        return written

    with ThreadPoolExecutor(2) as pool:
        failing, writing = pool.submit(fails), pool.submit(writes)
        assert writing.result(30) == 1
        with pytest.raises(KeyError):
            failing.result(30)
    assert get(store, 9, ("batch", 1))[1] == [NOT_FOUND] * COUNT
    assert get(store, 9, ("other", 1))[1] == [PRESENT] * COUNT


def test_rows_of_an_older_layout_cost_one_look_up(
    open_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = declare({"price": "float"}), declare({"price": "float", "stock": "int"})
    put(open_store(old), old, *(row(1, key=("a", shelf), price=float(shelf)) for shelf in range(9)))
    store, asked = open_store(new), []
    look_up = type(store)._layout_of

    def counted(self: Any, *arguments: Any) -> Any:
        asked.append(arguments)
        return look_up(self, *arguments)

    monkeypatch.setattr(type(store), "_layout_of", counted)
    reader = store.reader(["thing"])
    for _ in range(2):
        matrix, _ = reader.read([keys(*(("a", shelf) for shelf in range(9)))], np.full(9, 5))
        assert matrix[:, 0].tolist() == [float(shelf) for shelf in range(9)]
    assert len(asked) == 1


def _raised(features: Any, version: int) -> Any:
    view = features.views["thing"].model_copy(update={"version": version})
    return features.model_copy(update={"views": features.views | {"thing": view}})


def test_rows_that_are_not_declared_can_be_dropped(open_store: Opener) -> None:
    versions = [FEATURES, _raised(FEATURES, 2), _raised(FEATURES, 3)]
    stores = [open_store(features) for features in versions]
    other = open_store(FEATURES, "other")
    for each, features in ((stores[0], FEATURES), (stores[1], versions[1]), (other, FEATURES)):
        each.replace("thing", [table(features, "thing", [row(1)])], Cursor("t", 1))
        name = table(features, "name", [{"shop": "a", "event_time": 1, "created_time": 1}])
        each.write("name", name)
    # The third definition has no rows yet: the others may still be served.
    stores[2].drop_undeclared()
    assert [get(store, 9)[1][0] for store in stores] == [PRESENT, PRESENT, NOT_FOUND]
    stores[2].move_cursor("thing", Cursor("u", 0))
    put(stores[2], versions[2], row(1))
    stores[2].drop_undeclared()
    assert [get(store, 9)[1][0] for store in stores] == [NOT_FOUND, NOT_FOUND, PRESENT]
    assert [store.cursor("thing") is None for store in stores] == [True, True, False]
    asked = [np.array(["a"], object)]
    assert stores[0].read_matrix("name", asked, np.array([1]))[1].shape == (1, 0)
    assert stores[2].reader(["name"]).read_table([asked], np.array([1]))[1][0, 0] == NULL
    gone = {name: view for name, view in FEATURES.views.items() if name != "name"}
    open_store(FEATURES.model_copy(update={"views": gone})).drop_undeclared()
    assert stores[2].reader(["name"]).read_table([asked], np.array([1]))[1][0, 0] == NOT_FOUND
    assert get(other, 9)[1] == [PRESENT] * COUNT


def test_keys_that_no_row_can_have_are_not_found(open_store: Opener) -> None:
    store = open_store(FEATURES)
    put(store, FEATURES, row(1))
    objects = [np.array(["north", "\ud800"], object), np.array([np.int64(1), 1], object)]
    _, statuses = store.read_matrix("thing", objects, np.array([5, 5]))
    assert statuses[:, 0].tolist() == [PRESENT, NOT_FOUND]
    with pytest.raises(FeatureStoreError, match="needs a view"):
        store.reader([])
