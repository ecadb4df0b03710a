"""The executor on a real Ray: caching, resume, effects, failures."""

from __future__ import annotations

from typing import Any

import pytest
from orchestration.bench import Bench

from mlops_ray.errors import StepError
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.records import StepChange
from mlops_ray.orchestration.graph import build
from mlops_ray.orchestration.plan import make_plan
from mlops_ray.orchestration.spec import RunSpec

HERE = "orchestration.sample_steps"


def chain() -> dict[str, dict[str, Any]]:
    return {
        "numbers": {"uses": f"{HERE}.numbers", "with": {"count": 5}},
        "total": {"uses": f"{HERE}.total", "with": {"table": "$numbers"}, "marks": True},
        "folder": {"uses": f"{HERE}.folder", "with": {"total": "$total"}},
        "read": {"uses": f"{HERE}.read", "with": {"folder": "$folder", "extra": ["$total.value"]}},
        "odd": {"uses": f"{HERE}.effect", "when": "$total.even", "marks": True, "mode": "effect"},
        "never": {"uses": f"{HERE}.numbers", "with": {"count": "$nope"}, "after": ["odd"]},
    }


def test_values_tables_and_folders_flow_and_a_second_run_is_cached(bench: Bench) -> None:
    steps = chain()
    del steps["never"]
    record, states, executor = bench.run(bench.project(**steps))
    assert executor.output(record.run_id, "read") == "1010"
    assert set(states.values()) == {"succeeded"}
    second, states, _ = bench.run(bench.project(**chain() | {"never": steps["numbers"]}))
    assert second.run_id != record.run_id
    assert states["total"] == states["folder"] == states["read"] == "cached"
    assert states["odd"] == "succeeded"
    assert bench.count("total") == 1
    assert bench.count("effect") == 2


def test_a_false_condition_skips_the_step_and_those_that_need_it(bench: Bench) -> None:
    steps = chain()
    del steps["never"]
    steps["numbers"]["with"] = {"count": 3}
    steps["after_odd"] = {"uses": f"{HERE}.numbers", "with": {"count": "$odd"}}
    _, states, _ = bench.run(bench.project(**steps))
    assert states["odd"] == states["after_odd"] == "skipped"
    assert bench.count("effect") == 0


def test_a_failed_run_goes_on_where_it_stopped_and_effects_happen_once(bench: Bench) -> None:
    project = bench.project(
        effect={"uses": f"{HERE}.effect", "mode": "effect", "marks": True},
        then={"uses": f"{HERE}.fail_once", "with": {"effect": "$effect"}, "marks": True},
    )
    with pytest.raises(StepError) as caught:
        bench.run(project)
    assert caught.value.step == "then"
    assert str(caught.value).startswith("step then: ValueError: the first time it fails\n  fix:")
    assert "ValueError" in caught.value.detail
    record, states, executor = bench.run(project)
    assert record.run_id == caught.value.run_id
    assert set(states.values()) == {"succeeded"}
    assert executor.output(record.run_id, "then") == 2
    assert bench.count("effect") == bench.count("after") == 1


def test_an_effect_whose_code_or_inputs_changed_happens_again_on_resume(bench: Bench) -> None:
    project = bench.project(
        effect={"uses": f"{HERE}.effect", "mode": "effect", "marks": True},
        then={"uses": f"{HERE}.fail_once", "with": {"effect": "$effect"}, "marks": True},
    )
    with pytest.raises(StepError) as caught:
        bench.run(project)
    older = StepChange(run_id=caught.value.run_id, name="effect", values={"key": "of older code"})
    bench.ledger.apply([older])
    bench.run(project)
    assert bench.count("effect") == 2


def test_a_fresh_run_does_not_go_on_with_an_old_one(bench: Bench) -> None:
    project = bench.project(
        effect={"uses": f"{HERE}.effect", "mode": "effect", "marks": True},
        then={"uses": f"{HERE}.fail_once", "with": {"effect": "$effect"}, "marks": True},
    )
    with pytest.raises(StepError) as caught:
        bench.run(project)
    record = bench.executor(project).run(fresh=True)
    assert record.run_id != caught.value.run_id
    assert bench.count("effect") == 2


def test_plan_assumes_that_what_must_run_gives_what_it_gave(bench: Bench) -> None:
    steps = {k: v for k, v in chain().items() if k in ("numbers", "total")}
    steps["numbers"]["mode"] = "ensure"
    project = bench.project(**steps)
    bench.run(project)
    artifacts = open_artifacts(bench.home)
    plan = make_plan(RunSpec.of(project), build(project.workflow), bench.ledger, artifacts)
    assert [s.state for s in plan.steps] == ["run", "cached"]
    assert "if numbers gives what it gave last" in plan.steps[1].reason


def test_retries_are_used_before_failing(bench: Bench) -> None:
    project = bench.project(
        effect={"uses": f"{HERE}.effect", "mode": "effect", "marks": True},
        then={
            "uses": f"{HERE}.fail_once",
            "with": {"effect": "$effect"},
            "marks": True,
            "retries": 1,
        },
    )
    _, states, _ = bench.run(project)
    assert states["then"] == "succeeded"


def test_a_worker_that_dies_is_a_step_error(bench: Bench) -> None:
    retries = {"infrastructure": 1, "backoff": {"first": "10ms"}}
    die = {"uses": f"{HERE}.die", "marks": True, "retries": retries}
    with pytest.raises(StepError) as caught:
        bench.run(bench.project(die=die))
    assert caught.value.step == "die"
    assert f"mlops-ray logs {caught.value.run_id} die" in caught.value.fix
    assert bench.count("die") == 2


def test_an_input_of_the_wrong_type_is_named(bench: Bench) -> None:
    project = bench.project(numbers={"uses": f"{HERE}.numbers", "with": {"count": "many"}})
    with pytest.raises(StepError, match="input 'count' does not fit"):
        bench.run(project)


def test_a_corrupt_artifact_is_found_and_made_again(bench: Bench) -> None:
    steps = {k: v for k, v in chain().items() if k in ("numbers", "total")}
    bench.run(bench.project(**steps))
    ledger = bench.ledger
    run = ledger.runs()[0]
    output = ledger.steps(run.run_id)[0].output
    assert output is not None
    open_artifacts(bench.home).path(output.digest).write_bytes(b"broken")
    steps = {k: v for k, v in chain().items() if k in ("numbers", "total")}
    _, states, _ = bench.run(bench.project(**steps))
    assert states == {"numbers": "succeeded", "total": "cached"}


def test_plan_says_what_is_cached_without_running(bench: Bench) -> None:
    steps = {k: v for k, v in chain().items() if k in ("numbers", "total")}
    bench.run(bench.project(**steps))
    steps = {k: v for k, v in chain().items() if k in ("numbers", "total", "folder", "read")}
    steps["numbers"]["with"] = {"count": 5}
    project = bench.project(**steps)
    artifacts = open_artifacts(bench.home)
    plan = make_plan(RunSpec.of(project), build(project.workflow), bench.ledger, artifacts)
    assert [s.state for s in plan.steps] == ["cached", "cached", "run", "depends"]
    changed = bench.project(
        **steps | {"numbers": {"uses": f"{HERE}.numbers", "with": {"count": 9}}}
    )
    plan = make_plan(RunSpec.of(changed), build(changed.workflow), bench.ledger, artifacts)
    assert [s.state for s in plan.steps] == ["run", "depends", "depends", "depends"]
