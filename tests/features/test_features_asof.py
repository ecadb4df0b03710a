"""The point-in-time join against a brute-force oracle and against DuckDB's ASOF JOIN."""

from __future__ import annotations

import duckdb
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.features.asof import asof_join

times = st.integers(-20, 20)
labels = st.lists(st.tuples(st.integers(-1, 3), times), max_size=20)
rows = st.lists(st.tuples(st.integers(0, 3), times, times), max_size=40)


def arrays(items: list[tuple[int, ...]], width: int) -> list[np.ndarray]:
    return list(np.array(items, np.int64).reshape(-1, width).T)


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


@settings(max_examples=300, deadline=None)
@given(labels, rows, st.one_of(st.none(), st.integers(0, 15)), st.booleans())
def test_join_is_the_oracle(asked, items, ttl: int | None, known_only: bool) -> None:
    found = asof_join(*arrays(asked, 2), *arrays(items, 3), ttl_us=ttl, known_only=known_only)
    assert found.tolist() == [oracle(items, e, t, ttl, known_only) for e, t in asked]


@settings(max_examples=50, deadline=None)
@given(labels, rows)
def test_times_that_do_not_fit_beside_the_entity_are_ranked(asked, items) -> None:
    far = 1 << 61
    stretched_labels = [(e, t * (far // 32)) for e, t in asked]
    stretched_rows = [(e, t * (far // 32), c * (far // 32)) for e, t, c in items]
    near = asof_join(*arrays(asked, 2), *arrays(items, 3))
    wide = asof_join(*arrays(stretched_labels, 2), *arrays(stretched_rows, 3))
    assert near.tolist() == wide.tolist()


def test_ttl_edges() -> None:
    one = np.zeros(1, np.int64)

    def age(microseconds: int, ttl: int | None) -> int:
        return int(asof_join(one, one + microseconds, one, one, one, ttl_us=ttl)[0])

    assert [age(10, 10), age(11, 10), age(0, 0), age(1, 0), age(10**15, None)] == [0, -1, 0, -1, 0]
    assert age(-1, None) == -1


def test_of_duplicates_the_newest_created_counts_and_only_once_it_is_known() -> None:
    entity = np.zeros(3, np.int64)
    event, created = np.array([5, 5, 5]), np.array([9, 7, 20])
    at = np.array([6, 7, 8, 9, 20])
    found = asof_join(np.zeros(5, np.int64), at, entity, event, created)
    assert found.tolist() == [-1, 1, 1, 0, 2]


def test_a_newer_event_that_is_not_known_yet_does_not_hide_an_older_one() -> None:
    found = asof_join(*arrays([(0, 10)], 2), *arrays([(0, 8, 15), (0, 3, 3)], 3))
    assert found.tolist() == [1]
    late = asof_join(*arrays([(0, 10)], 2), *arrays([(0, 8, 15), (0, 3, 3)], 3), known_only=False)
    assert late.tolist() == [0]


def test_duckdb_asof_join_agrees() -> None:
    random = np.random.default_rng(7)
    count = 5_000
    entity, event = random.integers(0, 50, count), random.integers(0, 10**6, count)
    asked, at = random.integers(0, 60, count), random.integers(0, 10**6, count)
    found = asof_join(asked, at, entity, event, event)
    connection = duckdb.connect()
    connection.register("r", {"e": entity, "t": event})
    connection.register("l", {"n": np.arange(count), "e": asked, "t": at})
    expected = connection.execute(
        "select l.n, coalesce(r.t, -1) from l asof left join r on l.e = r.e and l.t >= r.t order by 1"
    ).fetchall()
    ours = np.where(found < 0, -1, event[found])
    assert ours.tolist() == [time for _, time in expected]
