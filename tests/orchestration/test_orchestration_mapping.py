"""Mapped steps on a real Ray: lists in, lists out, one record and one cache key for each call."""

from __future__ import annotations

from typing import Any

import pytest
from orchestration.bench import Bench

from mlops_ray.errors import StepError, WorkflowError

HERE = "orchestration.sample_steps"


def squares(count: int, **more: Any) -> dict[str, dict[str, Any]]:
    square = {"uses": f"{HERE}.square", "map": {"number": "$split"}, "marks": True} | more
    return {
        "split": {"uses": f"{HERE}.split", "with": {"count": count}},
        "square": square,
        "add": {"uses": f"{HERE}.add", "with": {"values": "$square"}},
    }


def test_a_step_is_called_for_each_element_and_gives_their_list(bench: Bench) -> None:
    record, states, executor = bench.run(bench.project(**squares(40)))
    assert set(states.values()) == {"succeeded"}
    assert executor.output(record.run_id, "square") == [n * n for n in range(40)]
    assert executor.output(record.run_id, "add") == sum(n * n for n in range(40))
    calls = bench.ledger.items(record.run_id, "square")
    assert [call.item for call in calls] == list(range(40))
    assert {(call.status, call.attempt) for call in calls} == {("succeeded", 1)}
    assert len({call.key for call in calls}) == 40
    assert all(bench.count(f"square {n}") == 1 for n in range(40))


def test_only_new_elements_are_called_when_the_list_has_changed(bench: Bench) -> None:
    bench.run(bench.project(**squares(6)))
    record, _, executor = bench.run(bench.project(**squares(9)))
    assert executor.output(record.run_id, "add") == sum(n * n for n in range(9))
    assert all(bench.count(f"square {n}") == 1 for n in range(9))
    calls = bench.ledger.items(record.run_id, "square")
    assert [call.status for call in calls] == ["cached"] * 6 + ["succeeded"] * 3


def test_an_empty_list_gives_an_empty_list(bench: Bench) -> None:
    assert bench.result("add", **squares(0)) == 0


def test_lists_are_taken_together_and_must_be_of_one_length(bench: Bench) -> None:
    steps: dict[str, dict[str, Any]] = {
        "numbers": {"uses": f"{HERE}.split", "with": {"count": 3}},
        "weights": {"uses": f"{HERE}.split", "with": {"count": 3, "start": 10}},
        "weigh": {
            "uses": f"{HERE}.weigh",
            "map": {"number": "$numbers", "weight": "$weights"},
        },
    }
    weighed = bench.result("weigh", **steps)
    assert weighed == [
        {"number": 0, "weighed": 0.0},
        {"number": 1, "weighed": 11.0},
        {"number": 2, "weighed": 24.0},
    ]
    steps["weights"]["with"] = {"count": 4}
    with pytest.raises(WorkflowError, match="one length"):
        bench.run(bench.project(**steps))
    assert bench.states(bench.ledger.runs()[0].run_id)["weigh"] == "failed"


def test_outputs_of_calls_may_be_mapped_over_again_whatever_they_are(bench: Bench) -> None:
    steps = {
        "split": {"uses": f"{HERE}.split", "with": {"count": 4}},
        "rows": {"uses": f"{HERE}.rows", "map": {"number": "$split"}},
        "height": {"uses": f"{HERE}.height", "map": {"table": "$rows"}},
        "third": {"uses": f"{HERE}.height", "with": {"table": "$rows.2"}},
        "all": {"uses": f"{HERE}.tables", "with": {"values": "$rows"}},
        "both": {"uses": f"{HERE}.collect", "with": {"values": ["$height", "$third"]}},
    }
    record, _, executor = bench.run(bench.project(**steps))
    assert executor.output(record.run_id, "all") == [1, 2, 3, 4]
    assert executor.output(record.run_id, "both") == [[1, 2, 3, 4], 3]


def test_a_call_that_fails_is_named_and_only_it_runs_again(bench: Bench) -> None:
    steps = squares(6, uses=f"{HERE}.square_once_broken")
    with pytest.raises(StepError, match=r"step square, call 3: ValueError: three is not liked"):
        bench.run(bench.project(**steps))
    run = bench.ledger.runs()[0]
    assert bench.states(run.run_id)["square"] == "failed"
    assert bench.ledger.items(run.run_id, "square")[3].status == "failed"
    record, states, executor = bench.run(bench.project(**steps))
    assert record.run_id == run.run_id
    assert states["add"] == "succeeded"
    assert executor.output(record.run_id, "add") == 55
    assert sum(bench.count(f"square {n}") for n in range(6)) >= 6
    assert bench.count("square 3") == 1


def test_calls_that_were_cut_off_by_another_ones_error_wait_again(bench: Bench) -> None:
    steps = {
        "values": {"uses": f"{HERE}.collect", "with": {"values": [60, 60, -1]}},
        "sleep": {"uses": f"{HERE}.sleep", "map": {"seconds": "$values"}, "marks": True},
    }
    with pytest.raises(StepError, match="call 2: ValueError"):
        bench.run(bench.project(**steps))
    run = bench.ledger.runs()[0]
    calls = bench.ledger.items(run.run_id, "sleep")
    assert [call.status for call in calls] == ["pending", "pending", "failed"]


def test_each_call_has_retries_of_its_own(bench: Bench) -> None:
    retries = {"user": 1, "backoff": {"first": "10ms"}}
    steps = squares(6, uses=f"{HERE}.square_once_broken", retries=retries)
    assert bench.result("add", **steps) == 55
    (retried,) = bench.events("step_retried")
    assert (retried["item"], retried["attempt"], retried["cause"]) == (3, 1, "user")
    assert all(bench.count(f"square {n}") == 1 for n in range(6))


def test_what_is_no_list_cannot_be_mapped_over(bench: Bench) -> None:
    steps = squares(3)
    steps["split"] = {"uses": f"{HERE}.effect", "marks": True}
    with pytest.raises(WorkflowError, match="is not a list"):
        bench.run(bench.project(**steps))


def test_who_looks_on_hears_how_many_calls_are_done(bench: Bench) -> None:
    seen: list[str | None] = []

    def listen(run: Any, steps: list[Any]) -> None:
        seen.append(next(step.message for step in steps if step.name == "span"))

    steps = {
        "names": {"uses": f"{HERE}.collect", "with": {"values": ["a", "b", "c", "d"]}},
        "span": {
            "uses": f"{HERE}.span",
            "map": {"name": "$names"},
            "max_parallel": 1,
            "marks": True,
        },
    }
    bench.executor(bench.project(**steps), listen).run()
    assert seen[-1] == "4/4"
    assert {"1/4", "2/4", "3/4"} & set(seen)
