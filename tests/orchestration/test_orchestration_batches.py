"""Calls that travel together: each has its own fate."""

from __future__ import annotations

from typing import Any

import pytest
from orchestration.bench import Bench

from mlops_ray.errors import StepError
from mlops_ray.orchestration.work import Work

HERE = "orchestration.sample_steps"


@pytest.fixture(autouse=True)
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls count as short, so that they travel together however busy the machine is."""
    took = Work.took
    monkeypatch.setattr(Work, "took", lambda work, seconds: took(work, 0.001))


def calls(function: str, **more: Any) -> dict[str, dict[str, Any]]:
    call = {"uses": f"{HERE}.{function}", "map": {"number": "$split"}, "max_parallel": 1}
    return {
        "split": {"uses": f"{HERE}.split", "with": {"count": 200}},
        "call": call | more,
    }


def test_what_was_done_beside_a_call_that_fails_is_not_done_again(bench: Bench) -> None:
    project = bench.project(**calls("hundredth_fails", marks=True, mode="effect"))
    with pytest.raises(StepError, match="a hundred is not liked"):
        bench.run(project)
    run = bench.ledger.runs()[0]
    items = {item.item: item.status for item in bench.ledger.items(run.run_id, "call")}
    assert items.pop(100) == "failed"
    done = {number for number in range(200) if bench.count(f"call {number}")} - {100}
    assert {item for item, status in items.items() if status == "succeeded"} == done
    assert max(done) > 100, "the hundredth call travelled with the next ones"
    assert "running" not in items.values()
    (bench.marks / "good").touch()
    bench.run(project)
    counts = [bench.count(f"call {number}") for number in range(200)]
    assert counts == [1] * 100 + [2] + [1] * 99


def test_a_crash_is_the_fault_of_the_call_that_crashes(bench: Bench) -> None:
    project = bench.project(**calls("hundredth_dies", retries={"infrastructure": 0}))
    with pytest.raises(StepError, match="died unexpectedly") as caught:
        bench.run(project)
    assert caught.value.where == "step call, call 100"
    (crashed,) = bench.events("batch_crashed")
    assert 100 in crashed["calls"]
    run = bench.ledger.runs()[0]
    items = bench.ledger.items(run.run_id, "call")
    assert [item.item for item in items if item.status == "failed"] == [100]
    assert "running" not in {item.status for item in items}
