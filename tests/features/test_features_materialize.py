from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from features.online_samples import Opener, declare, get, open_store, redis_server, row, table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import NOT_FOUND, PRESENT, OnlineStore
from mlops_ray.features.pruning import prune

__all__ = ["open_store", "redis_server"]

FEATURES = declare(ttl=None)


@pytest.fixture
def offline(tmp_path: Path) -> OfflineStore:
    return OfflineStore(tmp_path / "offline", FEATURES)


def append(offline: OfflineStore, watermark_us: int, *rows: Any, generation: str = "") -> int:
    return offline.append("thing", table(FEATURES, "thing", rows), watermark_us, generation)


def price(store: OnlineStore, shelf: int = 1, at: int = 10**9) -> float | None:
    return get(store, at, ("north", shelf))[0]["price"]


def test_full_then_by_commit(offline: OfflineStore, open_store: Opener) -> None:
    store = open_store(FEATURES)
    assert materialize_view(offline, store, "thing") == 0
    assert store.cursor("thing") is None
    append(offline, 20, row(5, 10, price=1.0), row(6, 20, price=2.0), row(7, key=("north", 2)))
    assert materialize_view(offline, store, "thing", "") == 2
    assert price(store) == 2.0
    cursor = store.cursor("thing")
    assert cursor is not None
    assert (cursor.table, cursor.version, cursor.watermark_us) == (offline.table_id("thing"), 0, 20)
    assert materialize_view(offline, store, "thing") == 0
    # Late: it happened before what is online, and is of an entity that has no row yet.
    append(offline, 30, row(1, 30, key=("north", 3), price=3.0), row(2, 30, price=9.0))
    append(offline, 40, row(6, 40, price=4.0))
    assert materialize_view(offline, store, "thing") == 2
    assert (price(store), price(store, 3)) == (4.0, 3.0)
    assert price(store, at=39) is None
    cursor = store.cursor("thing")
    assert cursor is not None
    assert cursor.version == 2


def test_compaction_brings_nothing_and_vacuum_takes_nothing(
    offline: OfflineStore, open_store: Opener
) -> None:
    store, late = open_store(FEATURES), open_store(FEATURES, "late")
    for moment in range(1, 6):
        append(offline, moment, row(moment, price=float(moment)), row(0, moment, ("north", moment)))
        if moment == 2:
            materialize_view(offline, late, "thing")
    materialize_view(offline, store, "thing")
    offline.compact("thing")
    assert materialize_view(offline, store, "thing") == 0
    offline.vacuum("thing", retention=timedelta(0))
    assert materialize_view(offline, late, "thing") > 0
    for each in (store, late):
        assert price(each) == 5.0
        assert all(price(each, shelf) is not None for shelf in range(2, 6))


def test_rows_of_another_generation_take_the_place_of_all(
    offline: OfflineStore, open_store: Opener
) -> None:
    store = open_store(FEATURES)
    append(offline, 20, row(9, price=1.0), row(9, key=("north", 2)), generation="a")
    materialize_view(offline, store, "thing", "a")
    append(offline, 20, row(5, price=2.0), generation="b")
    assert price(store) == 1.0
    assert materialize_view(offline, store, "thing", "b") > 0
    assert price(store) == 2.0
    assert get(store, 99, ("north", 2))[1] == [NOT_FOUND] * 6
    cursor = store.cursor("thing")
    assert cursor is not None
    assert (cursor.generation, cursor.watermark_us) == ("b", 20)


def test_a_table_made_anew_fills_the_view_anew(offline: OfflineStore, open_store: Opener) -> None:
    store = open_store(FEATURES)
    append(offline, 20, row(9, price=1.0), row(9, key=("north", 2)))
    append(offline, 30, row(29, price=1.0))
    materialize_view(offline, store, "thing")
    shutil.rmtree(offline.path("thing"))
    again = OfflineStore(offline.root, FEATURES)
    for moment in (1, 2, 3):
        append(again, moment, row(moment, price=float(moment)))
    assert materialize_view(again, store, "thing") > 0
    assert price(store) == 3.0
    assert get(store, 99, ("north", 2))[1] == [NOT_FOUND] * 6


def test_written_before_it_was_committed(offline: OfflineStore, open_store: Opener) -> None:
    """The pipeline writes online first; what it then commits is found to be there."""
    store = open_store(FEATURES)
    append(offline, 20, row(9, price=1.0))
    materialize_view(offline, store, "thing")
    store.write("thing", table(FEATURES, "thing", [row(50, price=5.0)]))
    append(offline, 30, row(25, price=2.0))
    materialize_view(offline, store, "thing")
    assert price(store) == 5.0
    assert materialize_view(offline, store, "thing", full=True) > 0
    assert price(store) == 2.0


def test_a_failure_before_the_cursor_moves_is_made_good(
    offline: OfflineStore, open_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(FEATURES)
    append(offline, 1, row(1, price=1.0))
    materialize_view(offline, store, "thing")
    for moment in (2, 3):
        append(offline, moment, row(moment, key=("north", moment), price=float(moment)))
    write, calls = type(store).write, []

    def fails_second(self: Any, view: str, rows: pa.Table) -> int:
        calls.append(view)
        if len(calls) == 2:
            raise OSError("pulled the plug")
        return write(self, view, rows)

    monkeypatch.setattr(type(store), "write", fails_second)
    with pytest.raises(OSError, match="pulled the plug"):
        materialize_view(offline, store, "thing")
    cursor = store.cursor("thing")
    assert cursor is not None
    assert cursor.version == 0
    monkeypatch.undo()
    materialize_view(offline, store, "thing")
    assert [price(store, shelf) for shelf in (1, 2, 3)] == [1.0, 2.0, 3.0]


_steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 4), st.integers(0, 20)), max_size=6),
        st.sampled_from(["append", "compact", "materialize", "full"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_steps)
def test_any_course_of_commits_ends_at_the_newest_rows(
    open_store: Opener, tmp_path_factory: pytest.TempPathFactory, steps: list[Any]
) -> None:
    offline = OfflineStore(tmp_path_factory.mktemp("offline"), FEATURES)
    store = open_store(FEATURES)
    store.clear()
    newest: dict[int, tuple[int, int]] = {}
    for moment, (events, then) in enumerate(steps, 100):
        rows = []
        for shelf, event in dict(events).items():
            rows.append(row(event, moment, ("north", shelf), price=float(event), stock=moment))
            newest[shelf] = max(newest.get(shelf, (0, 0)), (event, moment))
        append(offline, moment, *rows)
        if then == "compact":
            offline.compact("thing")
        elif then != "append":
            materialize_view(offline, store, "thing", full=then == "full")
    materialize_view(offline, store, "thing")
    for shelf in range(1, 5):
        found, statuses = get(store, 10**6, ("north", shelf))
        if shelf not in newest:
            assert statuses == [NOT_FOUND] * 6
        else:
            assert (found["price"], found["stock"]) == newest[shelf]
            assert statuses[0] == PRESENT


def test_more_rows_than_fit_into_a_batch(offline: OfflineStore, open_store: Opener) -> None:
    count, things = 150_000, 20_000
    random = np.random.default_rng(0)

    def rows() -> Iterator[pa.Table]:
        instant = pa.timestamp("us", tz="UTC")
        for part in range(2):
            shelf = random.integers(0, things, count)
            event = np.arange(count) + part * count
            times = [pa.array(values).cast(instant) for values in (event, event)]
            values = {"a": event.astype(float), "b": pa.nulls(count, pa.float64())}
            newest[shelf] = event
            yield pa.table(
                {"shelf": shelf, "event_time": times[0], "created_time": times[1], **values}
            )

    newest = np.full(things, np.nan)
    offline.append("plain", rows(), 10**7)
    store = open_store(FEATURES)
    assert materialize_view(offline, store, "plain") >= np.isfinite(newest).sum()
    found, _ = store.read_matrix("plain", [np.arange(things)], np.full(things, 10**8))
    np.testing.assert_array_equal(found[:, 0], newest)


def test_rows_of_another_generation_are_not_taken_for_those_asked_for(
    offline: OfflineStore, open_store: Opener
) -> None:
    store = open_store(FEATURES)
    append(offline, 20, row(5, price=1.0), generation="old")
    for full in (False, True):
        with pytest.raises(FeatureStoreError, match="not made by its present code"):
            materialize_view(offline, store, "thing", "new", full=full)
    assert store.cursor("thing") is None
    assert materialize_view(offline, store, "thing") == 1
    first = store.cursor("thing")
    append(offline, 20, row(5, price=2.0), generation="new")
    materialize_view(offline, store, "thing")
    assert price(store) == 2.0
    second = store.cursor("thing")
    assert first is not None
    assert second is not None
    assert first.generation != second.generation


def test_a_view_that_is_filled_anew_meanwhile_gets_the_rows_once_more(
    offline: OfflineStore, open_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = open_store(FEATURES), open_store(FEATURES)
    append(offline, 1, row(1, price=1.0))
    materialize_view(offline, store, "thing")
    before = store.cursor("thing")
    assert before is not None
    old = offline.read("thing")
    append(offline, 2, row(2, price=2.0), row(2, key=("north", 2), price=2.0))
    write, fills = type(store).write, [before]

    def then_replaced(self: Any, view: str, rows: pa.Table) -> int:
        written: int = write(self, view, rows)
        if fills:
            other.replace(view, [old], fills.pop())
        return written

    monkeypatch.setattr(type(store), "write", then_replaced)
    materialize_view(offline, store, "thing")
    assert (price(store), price(store, 2)) == (2.0, 2.0)
    cursor = store.cursor("thing")
    assert cursor is not None
    assert cursor.version == 1


def test_prune_takes_the_online_rows_along(offline: OfflineStore, open_store: Opener) -> None:
    view = FEATURES.views["thing"].model_copy(update={"version": 2})
    newer = FEATURES.model_copy(update={"views": FEATURES.views | {"thing": view}})
    old, new = open_store(FEATURES), open_store(newer)
    append(offline, 1, row(1))
    materialize_view(offline, old, "thing")
    after = OfflineStore(offline.root, newer)
    append(after, 1, row(1))
    materialize_view(after, new, "thing")
    for dry_run, status in ((True, PRESENT), (False, NOT_FOUND)):
        assert [left.view for left in prune(newer, after, new, dry_run=dry_run)] == ["thing"]
        assert get(old, 9)[1] == [status] * 6
        assert get(new, 9)[1] == [PRESENT] * 6
