from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.monitoring.labels import LABEL, LabelJoin, shadow_aliases

START = datetime(2013, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def predictions(*rows: tuple[str, int, float], version: int = 1, shadow: bool = True) -> pa.Table:
    columns = {
        "id": [row[0] for row in rows],
        "time": pa.array([START + row[1] * HOUR for row in rows], pa.timestamp("us", tz="UTC")),
        "score": pa.array([row[2] for row in rows], pa.float64()),
        "version": pa.array([version] * len(rows), pa.int64()),
    }
    if shadow:
        columns["shadow_first"] = pa.array([row[2] / 2 for row in rows], pa.float64())
    return pa.table(columns)


def labels(*rows: tuple[str, int | None, int], received: int = 0) -> pa.Table:
    at = START + received * HOUR
    return pa.Table.from_pylist(
        [
            {"id": i, "label": label, "known_at": START + hours * HOUR, "received": at}
            for i, label, hours in rows
        ],
        schema=LABEL,
    )


def join(horizon_h: int = 48, keep_h: int = 1000) -> LabelJoin:
    return LabelJoin(horizon_h * HOUR, keep_h * HOUR)


def labelled(joined: LabelJoin) -> dict[str, float | None]:
    rows = joined.rows(START - 9999 * HOUR, START + 9999 * HOUR)
    return dict(zip(rows["id"].to_pylist(), rows["label"].to_pylist(), strict=True))


# A stream of both kinds: ("p" or "l", id, hour, value); brute force keeps dictionaries.
facts = st.lists(
    st.tuples(
        st.sampled_from("pl"), st.sampled_from("abcdefgh"), st.integers(0, 99), st.integers(0, 1)
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(facts, st.integers(0, 2**16))
def test_join_equals_brute_force_in_any_batches(
    stream: list[tuple[str, str, int, int]], seed: int
) -> None:
    joined, first_prediction = join(), {}
    told: list[tuple[str, int, int, int]] = []
    chance = random.Random(seed)
    for kind, key, hour, value in stream:
        if kind == "p":
            joined.add_predictions(predictions((key, hour, 0.5)))
            first_prediction.setdefault(key, hour)
        else:
            # They do not come in the order in which they were received.
            received = chance.randrange(20)
            joined.add_labels(labels((key, value, hour), received=received))
            told.append((key, received, hour, value))
        if chance.random() < 0.3:
            labelled(joined)  # settling early may not change the outcome
    expected = {}
    for key, hour in first_prediction.items():
        known = [fact for fact in told if fact[0] == key and fact[2] - hour <= 48]
        expected[key] = float(max(known)[3]) if known else None
    assert labelled(joined) == expected


@settings(max_examples=30, deadline=None)
@given(facts)
def test_repeating_everything_changes_nothing(stream: list[tuple[str, str, int, int]]) -> None:
    once, twice = join(), join()
    for kind, key, hour, value in stream:
        for joined in (once, twice, twice):
            if kind == "p":
                joined.add_predictions(predictions((key, hour, 0.5)))
            else:
                joined.add_labels(labels((key, value, hour)))
    assert [table.to_pylist() for table in once.tables()] == [
        table.to_pylist() for table in twice.tables()
    ]


def test_label_before_its_prediction() -> None:
    joined = join()
    joined.add_labels(labels(("a", 1, 5)))
    assert labelled(joined) == {}
    joined.add_predictions(predictions(("a", 1, 0.7)))
    assert labelled(joined) == {"a": 1.0}
    assert len(joined.tables()[1]) == 0


def test_horizon_edge() -> None:
    joined = join(horizon_h=10)
    joined.add_predictions(predictions(("in", 0, 0.1), ("out", 0, 0.1)))
    late = labels(("in", 1, 10), ("out", 1, 10))
    known_at = late["known_at"].to_pylist()
    known_at[1] += timedelta(microseconds=1)
    joined.add_labels(late.set_column(2, "known_at", pa.array(known_at, LABEL.field(2).type)))
    assert labelled(joined) == {"in": 1.0, "out": None}


def test_memory_is_bounded() -> None:
    joined = join(horizon_h=10, keep_h=24)
    for hour in range(0, 500):
        joined.add_predictions(predictions((f"p{hour}", hour, 0.5)))
        joined.add_labels(labels((f"stranger{hour}", 1, hour)))
        joined.forget(START + hour * HOUR)
    rows, unmatched = joined.tables()
    assert len(rows) == 25
    assert len(unmatched) == 11


def test_rows_by_window_and_version() -> None:
    joined = join()
    joined.add_predictions(predictions(("a", 3, 0.1), ("b", 1, 0.2), version=1))
    joined.add_predictions(predictions(("c", 2, 0.3), ("d", 4, 0.4), version=2, shadow=False))
    rows = joined.rows(START + HOUR, START + 4 * HOUR)
    assert rows["id"].to_pylist() == ["b", "c", "a"]
    assert rows["shadow_first"].to_pylist() == [pytest.approx(0.1), None, pytest.approx(0.05)]
    assert joined.rows(START, START + 9 * HOUR, version=2)["id"].to_pylist() == ["c", "d"]
    assert shadow_aliases(rows) == ["first"]


def test_tables_restore() -> None:
    joined, again = join(), join()
    joined.add_predictions(predictions(("a", 3, 0.1)))
    joined.add_labels(labels(("later", 0, 4), ("a", None, 4)))
    again.restore(*joined.tables())
    again.add_predictions(predictions(("later", 3, 0.9)))
    assert labelled(again) == {"a": None, "later": 0.0}
