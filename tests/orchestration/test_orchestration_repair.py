"""Blobs that are lost or corrupt: found, said, made again; never a wrong result."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from orchestration.bench import Bench

from mlops_ray.errors import StepError, WorkflowError
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.records import StepChange
from mlops_ray.orchestration import once
from mlops_ray.orchestration.ownership import borrowed

HERE = "orchestration.sample_steps"


def lossy(**first: Any) -> dict[str, dict[str, Any]]:
    """A run in which the output of ``split`` disappears before ``add`` reads it."""
    return {
        "split": {"uses": f"{HERE}.split", "with": {"count": 4}} | first,
        "digest": {
            "uses": f"{HERE}.digest_of",
            "with": {"step": "split"},
            "after": ["split"],
            "mode": "effect",
        },
        "forget": {
            "uses": f"{HERE}.forget_input",
            "with": {"digest": "$digest"},
            "mode": "effect",
        },
        "add": {"uses": f"{HERE}.add", "with": {"values": "$split"}, "after": ["forget"]},
    }


def test_an_input_that_is_gone_is_made_again_in_the_same_run(bench: Bench) -> None:
    record, states, executor = bench.run(bench.project(**lossy()))
    assert executor.output(record.run_id, "add") == 6
    assert set(states.values()) == {"succeeded"}
    (said,) = bench.events("artifact_corrupt")
    assert (said["step"], said["found_by"]) == ("split", "add")
    (again,) = [e for e in bench.events("step_running") if e["step"] == "split"][1:]
    assert again["attempt"] == 2


def test_a_mapped_step_goes_on_with_the_calls_it_has_done(bench: Bench) -> None:
    steps = lossy()
    steps["rows"] = {"uses": f"{HERE}.rows", "map": {"number": "$split"}}
    steps["digest"]["with"] = {"step": "rows"}
    steps["digest"]["after"] = ["rows"]
    steps["add"] = {
        "uses": f"{HERE}.tables",
        "with": {"values": "$rows"},
        "after": ["forget"],
    }
    record, _, executor = bench.run(bench.project(**steps))
    assert executor.output(record.run_id, "add") == [1, 2, 3, 4]
    assert [event["step"] for event in bench.events("artifact_corrupt")] == ["rows"]


def test_what_must_not_run_twice_is_not_made_again(bench: Bench) -> None:
    steps = lossy(mode="effect", idempotent=False)
    with pytest.raises(StepError, match="cannot be read") as caught:
        bench.run(bench.project(**steps))
    assert "must not run twice" in str(caught.value)


def test_a_corrupt_element_of_a_cached_list_is_made_again(bench: Bench) -> None:
    steps = {
        "split": {"uses": f"{HERE}.split", "with": {"count": 5}},
        "rows": {"uses": f"{HERE}.rows", "map": {"number": "$split"}},
        "all": {"uses": f"{HERE}.tables", "with": {"values": "$rows"}},
    }
    bench.run(bench.project(**steps))
    run = bench.ledger.runs()[0]
    output = bench.ledger.items(run.run_id, "rows")[3].output
    assert output is not None
    path = open_artifacts(bench.home).path(output.digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    record, states, executor = bench.run(bench.project(**steps))
    assert executor.output(record.run_id, "all") == [1, 2, 3, 4, 5]
    assert states == {"split": "cached", "rows": "succeeded", "all": "cached"}
    calls = [call.status for call in bench.ledger.items(record.run_id, "rows")]
    assert calls == ["cached", "cached", "cached", "succeeded", "cached"]
    assert {event["step"] for event in bench.events("artifact_corrupt")} == {"rows"}


def lose(bench: Bench, step: str) -> None:
    """Remove the output of a step of the newest run."""
    records = bench.ledger.steps(bench.ledger.runs()[0].run_id)
    output = next(record.output for record in records if record.name == step)
    assert output is not None
    open_artifacts(bench.home).path(output.digest).unlink()


def guarded() -> dict[str, dict[str, Any]]:
    """An effect that must not happen twice between a step of chance and one that fails at first."""
    return {
        "chance": {"uses": f"{HERE}.chance", "marks": True},
        "effect": {
            "uses": f"{HERE}.effect_of",
            "marks": True,
            "with": {"value": "$chance"},
            "mode": "effect",
            "idempotent": False,
        },
        "last": {"uses": f"{HERE}.wait_for_good", "marks": True, "with": {"value": "$effect"}},
    }


@pytest.mark.parametrize(
    ("gone", "why"), [("effect", "its output is lost"), ("chance", "its inputs are others now")]
)
def test_an_effect_that_happened_does_not_happen_again_when_something_is_lost(
    bench: Bench, gone: str, why: str
) -> None:
    project = bench.project(**guarded())
    with pytest.raises(StepError, match="not yet"):
        bench.run(project)
    run = bench.ledger.runs()[0]
    lose(bench, gone)
    (bench.marks / "good").touch()
    for _ in range(2):  # it goes on asking
        with pytest.raises(WorkflowError, match=why) as caught:
            bench.run(project)
        assert f"mlops-ray resolve {run.run_id} effect --done --output" in str(caught.value)
        assert bench.states(run.run_id)["effect"] == "uncertain"
    with borrowed(bench.ledger, run) as lease:
        artifacts, said = open_artifacts(bench.home), {"sent": 7}
        once.resolve(bench.ledger, artifacts, run, "effect", -1, "done", output=said, fence=lease)
    record, _, executor = bench.run(project)
    assert (record.run_id, executor.output(record.run_id, "last")) == (run.run_id, said)
    assert bench.count("effect") == 1


def test_a_run_goes_on_with_its_own_output_though_another_run_has_a_newer_one(bench: Bench) -> None:
    project = bench.project(**guarded())
    with pytest.raises(StepError, match="not yet"):
        bench.run(project)
    run = bench.ledger.runs()[0]
    (own,) = (step for step in bench.ledger.steps(run.run_id) if step.name == "chance")
    newer = run.model_copy(update={"run_id": "newer", "workflow": "another"})
    bench.ledger.start_run(newer, ["chance"])
    values = own.model_dump(include={"key", "status", "started_at"}) | {
        "output": open_artifacts(bench.home).put("something else"),
        "ended_at": datetime.now(UTC),
    }
    bench.ledger.apply([StepChange(run_id="newer", name="chance", values=values)])
    assert own.key is not None
    assert bench.ledger.cached([own.key])[own.key].run_id == "newer"
    (bench.marks / "good").touch()
    assert bench.run(project)[0].run_id == run.run_id
    assert (bench.count("chance"), bench.count("effect")) == (1, 1)
