"""The kernel of the point-in-time join against a brute-force oracle and DuckDB's ASOF JOIN."""

from __future__ import annotations

import duckdb
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.features.asof import asof_join
from mlops_ray.features.columns import NO_TIME

times = st.integers(-20, 20)
labels = st.lists(st.tuples(st.integers(-1, 3), times), max_size=20)
rows = st.lists(st.tuples(st.integers(0, 3), times, times), max_size=40)


def join(asked, items, **rule) -> list[int]:
    """Join unsorted items, and say which item each label is given."""
    entity, event, created = np.array(items, np.int64).reshape(-1, 3).T
    order = np.lexsort((created, event, entity))
    bounds = np.searchsorted(entity[order], np.arange(5))
    run, at = np.array(asked, np.int64).reshape(-1, 2).T
    place = asof_join(run, at.copy(), bounds, event[order], created[order], **rule)
    return [-1 if found < 0 else int(order[found]) for found in place]


def oracle(items, entity: int, time: int, ttl: int | None, known_only: bool) -> int:
    best = -1
    for number, (e, event, created) in enumerate(items):
        if e != entity or event > time or (known_only and created > time):
            continue
        if ttl is not None and time - event > ttl:
            continue
        if best < 0 or (event, created) >= items[best][1:]:
            best = number
    return best


@settings(max_examples=400, deadline=None)
@given(labels, rows, st.one_of(st.none(), st.integers(0, 15)), st.booleans())
def test_join_is_the_oracle(asked, items, ttl: int | None, known_only: bool) -> None:
    found = join(asked, items, ttl_us=ttl, known_only=known_only)
    assert found == [oracle(items, e, t, ttl, known_only) for e, t in asked]


@settings(max_examples=50, deadline=None)
@given(labels, rows, st.one_of(st.none(), st.integers(0, 15)))
def test_times_may_lie_as_far_apart_as_they_can(asked, items, ttl: int | None) -> None:
    unit = (1 << 63) // 21
    far_labels = [(e, t * unit) for e, t in asked]
    far_rows = [(e, t * unit, c * unit) for e, t, c in items]
    near = join(asked, items, ttl_us=ttl)
    assert join(far_labels, far_rows, ttl_us=None if ttl is None else ttl * unit) == near


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 3000))
def test_rows_that_were_created_long_after_are_stepped_over(seed: int, count: int) -> None:
    """Hundreds of rows of an entity lie between a label and the row that was known."""
    random = np.random.default_rng(seed)
    event = np.sort(random.integers(0, 1000, count))
    created = event + random.integers(0, 3000, count)
    at = random.integers(-10, 4000, 200)
    order = np.lexsort((created, event))
    event, created = event[order], created[order]
    bounds = np.array([0, count // 3, count])
    run = random.integers(0, 2, 200)
    found = asof_join(run, at, bounds, event, created)
    for place, label_run, time in zip(found, run, at, strict=True):
        mine = np.arange(bounds[label_run], bounds[label_run + 1])
        known = mine[(event[mine] <= time) & (created[mine] <= time)]
        assert place == (known[-1] if len(known) else -1)


def test_ttl_edges() -> None:
    def age(microseconds: int, ttl: int | None) -> int:
        return join([(0, 1 + microseconds)], [(0, 1, 1)], ttl_us=ttl)[0]

    assert [age(10, 10), age(11, 10), age(0, 0), age(1, 0), age(10**15, None)] == [0, -1, 0, -1, 0]
    assert age(-1, None) == -1


def test_of_duplicates_the_newest_created_counts_and_only_once_it_is_known() -> None:
    items = [(0, 5, 9), (0, 5, 7), (0, 5, 20)]
    asked = [(0, at) for at in (6, 7, 8, 9, 20)]
    assert join(asked, items) == [-1, 1, 1, 0, 2]
    assert join(asked, items, known_only=False) == [2] * 5


def test_a_newer_event_that_is_not_known_yet_does_not_hide_an_older_one() -> None:
    items = [(0, 8, 15), (0, 3, 3)]
    assert join([(0, 10)], items) == [1]
    assert join([(0, 10)], items, known_only=False) == [0]


def test_a_label_or_row_without_a_time_matches_nothing() -> None:
    assert join([(0, NO_TIME), (0, 5)], [(0, NO_TIME, 1), (0, NO_TIME, 2)]) == [-1, -1]
    assert join([(0, NO_TIME)], [(0, 1, 1)], ttl_us=10, known_only=False) == [-1]


def test_duckdb_asof_join_agrees() -> None:
    random = np.random.default_rng(7)
    count = 5_000
    entity, event = random.integers(0, 50, count), random.integers(0, 10**6, count)
    asked, at = random.integers(0, 50, count), random.integers(0, 10**6, count)
    order = np.lexsort((event, entity))
    bounds = np.searchsorted(entity[order], np.arange(51))
    found = asof_join(asked, at, bounds, event[order], event[order])
    connection = duckdb.connect()
    connection.register("r", {"e": entity, "t": event})
    connection.register("l", {"n": np.arange(count), "e": asked, "t": at})
    expected = connection.execute(
        "select l.n, coalesce(r.t, -1) from l asof left join r on l.e = r.e and l.t >= r.t order by 1"
    ).fetchall()
    ours = np.where(found < 0, -1, event[order][found])
    assert ours.tolist() == [time for _, time in expected]
