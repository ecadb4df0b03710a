"""Windows against a brute-force oracle, and the promise that batches never change a bit."""

from __future__ import annotations

import math

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.config.features import FeatureView
from mlops_ray.features.hyperloglog import codes_of, estimate
from mlops_ray.features.tiles import (
    boundaries_of,
    cells_of,
    expire,
    merge,
    no_cells,
)
from mlops_ray.features.window_plan import Rows, WindowPlan, plan_of
from mlops_ray.features.windows import emit

EVERY_US = 10_000_000
BY = ("count", "sum", "mean", "min", "max", "last", "approx_distinct")
PLAN = WindowPlan(
    EVERY_US,
    (1, 3, 8),
    tuple((by, int(by == "approx_distinct")) for by in BY),
    ("value",),
    ("value",),
)

one_row = st.tuples(
    st.integers(0, 3),
    st.integers(-40, 120),
    st.sampled_from([0, 0, 0, 1, 7, 30, 95]),
    st.one_of(st.none(), st.floats(-1e6, 1e6), st.sampled_from([0.1, 0.2, 0.3, 1e16, -1e16])),
)
row_lists = st.lists(one_row, max_size=60)


def make_rows(items: list[tuple[int, int, int, float | None]]) -> Rows:
    """Times are in seconds here; the third number is how long the row took to become known."""
    entity = np.array([item[0] for item in items], np.int64)
    event = np.array([item[1] for item in items], np.int64) * 1_000_000
    late = np.array([item[2] for item in items], np.int64) * 1_000_000
    values = np.array([0.0 if item[3] is None else item[3] for item in items], np.float64)
    valid = np.array([item[3] is not None for item in items], np.bool_)
    codes = codes_of(pa.array(values)).astype(np.float64)
    return Rows(entity, event, event + late, np.stack([values, codes]), np.stack([valid, valid]))


def backfill(rows: Rows, after: int = -(10**6), upto: int = 10**6):
    cells = cells_of(rows, PLAN)
    return emit(cells, *boundaries_of(cells, after, upto), PLAN)


def as_dict(emitted) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    keys = zip(emitted.entity.tolist(), emitted.boundary_us.tolist(), strict=True)
    rows = zip(emitted.values, emitted.null, strict=True)
    return {key: (v.tobytes(), n.tobytes()) for key, (v, n) in zip(keys, rows, strict=True)}


def oracle(rows: Rows, entity: int, boundary_us: int, window: int) -> list[float | None]:
    seen = [
        (rows.event_us[i], -(-rows.arrival_us[i] // EVERY_US), rows.arrival_us[i], v, valid)
        for i, (v, valid) in enumerate(
            zip((rows.values[0] + 0.0).tolist(), rows.valid[0].tolist(), strict=True)
        )
        if rows.entity[i] == entity
        and boundary_us - window * EVERY_US < rows.event_us[i] <= boundary_us
        and rows.arrival_us[i] <= boundary_us
    ]
    values = [row[3] for row in seen if row[4]]
    if not values:
        return [float(len(seen)), None, None, None, None, None, 0.0]
    newest = max((row for row in seen if row[4]), key=lambda row: row[:4])
    total = math.fsum(values)
    least, most = min(values), max(values)
    # The estimate of a set is that of its values in a row, whatever cells they went through.
    codes = codes_of(pa.array(sorted(set(values))))
    about = float(estimate(codes, np.zeros(len(codes), np.int64), 1)[0])
    assert abs(about - len(codes)) <= 2
    return [float(len(seen)), total, total / len(values), least, most, newest[3], about]


@settings(max_examples=80, deadline=None)
@given(row_lists)
def test_features_are_those_of_the_oracle(items: list) -> None:
    rows = make_rows(items)
    emitted = backfill(rows)
    due = {
        (int(e), int(-(-a // EVERY_US) * EVERY_US))
        for e, a in zip(rows.entity, rows.arrival_us, strict=True)
    }
    assert due == set(zip(emitted.entity.tolist(), emitted.boundary_us.tolist(), strict=True))
    scale = 1.0 + np.abs(rows.values).sum()
    for row, (entity, boundary_us) in enumerate(
        zip(emitted.entity, emitted.boundary_us, strict=True)
    ):
        for number, window in enumerate(PLAN.windows):
            expected = oracle(rows, entity, boundary_us, window)
            for place, value in enumerate(expected):
                at = place * len(PLAN.windows) + number
                assert emitted.null[row, at] == (value is None)
                if value is not None:
                    assert emitted.values[row, at] == pytest.approx(value, abs=1e-12 * scale)


@settings(max_examples=200, deadline=None)
@given(row_lists, st.lists(st.integers(-6, 25), max_size=12), st.booleans())
def test_incremental_advance_gives_the_bits_of_the_backfill(
    items: list, stops: list[int], forget: bool
) -> None:
    rows = make_rows(items)
    arrival = PLAN.tile(rows.arrival_us)
    cells, after, seen = no_cells(PLAN), -(10**6), {}
    for stop in [*sorted(set(stops)), 10**6]:
        fresh = cells_of(rows.take((arrival > after) & (arrival <= stop)), PLAN)
        cells = merge(cells, fresh)
        seen |= as_dict(emit(cells, *boundaries_of(fresh, after, stop), PLAN))
        if forget and stop < 10**6:
            cells = expire(cells, stop + 2 - PLAN.span)
        after = stop
    assert seen == as_dict(backfill(rows))


@settings(max_examples=100, deadline=None)
@given(row_lists, st.randoms(use_true_random=False), st.integers(1, 4))
def test_neither_the_order_of_rows_nor_partitions_change_a_bit(
    items: list, random, partitions: int
) -> None:
    expected = as_dict(backfill(make_rows(items)))
    random.shuffle(items)
    rows, merged = make_rows(items), {}
    for number in range(partitions):
        merged |= as_dict(backfill(rows.take(rows.entity % partitions == number)))
    assert merged == expected


@settings(max_examples=150, deadline=None)
@given(row_lists, st.integers(-6, 14))
def test_many_rows_go_another_way_to_the_same_bits(items: list, cut: int) -> None:
    rows = make_rows(items)
    few = as_dict(backfill(rows, after=cut))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlops_ray.features.tiles._FEW_ROWS", 0)
        patch.setattr("mlops_ray.features.windows._FEW_RUNS", 0)
        patch.setattr("mlops_ray.features.windows._PAIRS", 3)
        assert as_dict(backfill(rows, after=cut)) == few


def test_values_of_equal_size_do_not_come_from_differences_of_long_sums() -> None:
    # A running total would have lost the small values behind the large one.
    items = [(0, 1, 0, 1e17)] + [(0, 10 * tile + 5, 0, 0.1) for tile in range(10, 14)]
    emitted = backfill(make_rows(items))
    assert emitted.values[-1, 3 * 1 + 1] == 0.1 + 0.1 + 0.1


def test_boundary_and_window_edges() -> None:
    rows = make_rows([(0, 10, 0, 1.0), (0, 20, 0, 2.0), (0, 21, 0, 4.0)])
    emitted = backfill(rows)
    # The row at exactly H belongs to H; the row at exactly H − window does not.
    assert emitted.boundary_us.tolist() == [10_000_000, 20_000_000, 30_000_000]
    assert emitted.values[:, 3].tolist() == [1.0, 2.0, 4.0]
    assert emitted.values[:, 4].tolist() == [1.0, 3.0, 7.0]


def test_nan_is_a_value_and_null_is_not() -> None:
    rows = make_rows([(0, 1, 0, float("nan")), (0, 2, 0, 1.0), (1, 1, 0, None)])
    emitted = backfill(rows)
    total = emitted.values[:, PLAN.windows.index(1) + 3]
    assert np.isnan(total[0])
    assert emitted.null[:, 3].tolist() == [False, True]


def test_duckdb_agrees_on_rows_that_are_known_at_once() -> None:
    random = np.random.default_rng(5)
    items = [
        (int(e), int(t), 0, None if n else float(v))
        for e, t, v, n in zip(
            random.integers(0, 5, 400),
            random.integers(0, 500, 400),
            np.round(random.normal(size=400), 3),
            random.random(400) < 0.2,
            strict=True,
        )
    ]
    emitted = backfill(make_rows(items))
    connection = duckdb.connect()
    connection.execute("create table r (e int, t int, v double)")
    connection.executemany("insert into r values (?, ?, ?)", [(e, t, v) for e, t, _, v in items])
    for number, window in enumerate(PLAN.windows):
        expected = connection.execute(
            f"""with h as (select distinct e, cast(ceil(t / 10.0) * 10 as int) as h from r)
            select h.e, h.h, count(*), sum(v), min(v), max(v) from h join r
            on r.e = h.e and r.t > h.h - {window * 10} and r.t <= h.h
            group by h.e, h.h order by h.e, h.h"""
        ).fetchall()
        assert [(e, h) for e, h, *_ in expected] == [
            (e, h // 1_000_000)
            for e, h in zip(emitted.entity.tolist(), emitted.boundary_us.tolist(), strict=True)
        ]
        for place, column in ((0, 2), (1, 3), (3, 4), (4, 5)):
            at = place * len(PLAN.windows) + number
            ours = np.where(emitted.null[:, at], np.nan, emitted.values[:, at])
            theirs = np.array([np.nan if r[column] is None else r[column] for r in expected])
            np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_plan_orders_features_as_the_view_names_them() -> None:
    view = FeatureView(
        entity="e",
        source="s",
        event_time="t",
        every="1h",
        windows=["1d", "7d"],
        aggregates={
            "b": {"by": "sum", "of": "y"},
            "a": {"by": "mean", "of": "x"},
            "c": {"by": "max", "of": "y"},
        },
    )
    plan = plan_of(view)
    assert plan.columns == ("y", "x")
    assert plan.aggregates == (("sum", 0), ("mean", 1), ("max", 0))
    assert plan.windows == (24, 168)
    assert plan.width == len(view.feature_names) == 6
