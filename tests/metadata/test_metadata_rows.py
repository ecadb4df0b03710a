"""Writes as batches of rows: fewer statements, the same result."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.records import Link, NewEvent, NewKey, StepChange
from mlops_ray.metadata.rows import batches, cell, decode, encode


def change(name: str, item: int = -1, **values: object) -> StepChange:
    return StepChange(run_id="r", name=name, item=item, values=values)


def test_changes_of_one_step_become_one_row_and_the_last_value_counts() -> None:
    (batch,) = batches(
        [
            change("a", status="running", rows=1),
            change("a", rows=2, message="on"),
            change("a", status="succeeded"),
        ]
    )
    assert batch.columns == ("message", "rows", "status")
    assert batch.rows == [
        {
            "run_id": "r",
            "name": "a",
            "item": -1,
            "status": "succeeded",
            "rows": 2,
            "message": "on",
        }
    ]


def test_ten_thousand_calls_of_one_kind_are_two_statements_in_the_order_of_their_keys() -> None:
    writes: list[StepChange | NewEvent] = []
    for item in reversed(range(10_000)):
        writes.append(change("a", item, status="succeeded"))
        writes.append(NewEvent(project="p", kind="step", data={"item": item}))
    steps, events = batches(writes)
    assert [row["item"] for row in steps.rows] == list(range(10_000))
    assert [row["data"] for row in events.rows[:2]] == ['{"item": 9999}', '{"item": 9998}']


def test_steps_that_set_other_columns_are_apart_and_events_come_last() -> None:
    writes = [
        NewEvent(project="p", kind="k"),
        change("a", status="running"),
        change("b", rows=3),
        change("c", status="failed"),
        change("d"),
        NewKey(key="k", parts={}),
        Link(run_id="r", step="a", direction="reads", kind="view", name="v@1"),
    ]
    found = {(batch.table, batch.columns): len(batch.rows) for batch in batches(writes)}
    assert found.pop(("steps", ("status",))) == 2
    assert found.pop(("steps", ("rows",))) == 1
    assert found.pop(("steps", ())) == 1
    assert [table for table, _ in found] == ["keys", "links", "events"]
    assert batches([]) == []


@pytest.mark.parametrize("field", ["colour", "run_id"])
def test_what_is_no_column_of_a_step_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        batches([change("a", **{field: 1})])


def test_moments_are_in_utc_and_sort_as_text() -> None:
    moment = datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert cell(moment) == "2026-07-01T10:00:00.000000+00:00"
    assert cell(datetime(2026, 7, 1, 10)) == cell(moment)
    later = [moment + timedelta(microseconds=n) for n in (0, 1, 10, 999_999, 1_000_000)]
    assert sorted(map(cell, later)) == [cell(one) for one in later]


def test_a_record_comes_back_from_its_row() -> None:
    ref = ArtifactRef(digest="d", kind="json", size=1, rows=None)
    link = Link(run_id="r", step="a", direction="reads", kind="view", name="v@1")
    assert Link(**decode(encode(link))) == link
    row = {"output": cell(ref), "ended_at": cell(datetime(2026, 1, 1, tzinfo=UTC)), "params": "[]"}
    assert ArtifactRef(**decode(row)["output"]) == ref
    assert decode(row)["params"] == []
    assert decode(row)["ended_at"] == row["ended_at"]
