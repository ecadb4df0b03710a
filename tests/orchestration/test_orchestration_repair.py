"""Blobs that are lost or corrupt: found, said, made again; never a wrong result."""

from __future__ import annotations

from typing import Any

import pytest
from orchestration.bench import Bench

from mlops_ray.errors import StepError
from mlops_ray.metadata.artifacts import open_artifacts

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
