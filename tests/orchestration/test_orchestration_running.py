"""How steps run on a real Ray: limits, order, time, groups, environments, what they leave behind."""

from __future__ import annotations

import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from orchestration.bench import Bench

from mlops_ray.errors import StepError, WorkflowError
from mlops_ray.orchestration import capacity, executor
from mlops_ray.orchestration.cancellation import request_cancel
from mlops_ray.orchestration.capture import log_path
from mlops_ray.orchestration.executor import Executor
from mlops_ray.orchestration.scheduler import Scheduler
from mlops_ray.orchestration.spec import RunSpec
from mlops_ray.orchestration.tasks import _joint_options, _options

HERE = "orchestration.sample_steps"


def spans(bench: Bench, *names: str) -> list[tuple[float, float, int]]:
    texts = [(bench.marks / f"span {name}").read_text().split() for name in names]
    return [(float(began), float(ended), int(pid)) for began, ended, pid in texts]


def most_at_once(found: list[tuple[float, float, int]]) -> int:
    return max(sum(b <= began < e for b, e, _ in found) for began, _, _ in found)


def spanning(names: list[str]) -> dict[str, dict[str, Any]]:
    """Steps that leave spans, each more urgent than the one before."""
    span = {"uses": f"{HERE}.span", "marks": True}
    return {n: span | {"with": {"name": n}, "priority": i} for i, n in enumerate(names)}


@pytest.mark.parametrize("limit", [1, 2])
def test_at_most_so_many_tasks_run_at_once(bench: Bench, limit: int) -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    bench.run(bench.project({"max_parallel": limit}, **spanning(names)))
    assert most_at_once(spans(bench, *names)) <= limit


def test_the_urgent_ones_go_first(bench: Bench) -> None:
    names = ["a", "b", "c"]
    bench.run(bench.project({"max_parallel": 1}, **spanning(names)))
    began = [span[0] for span in spans(bench, *names)]
    assert began == sorted(began, reverse=True)


def test_a_mapped_step_may_have_a_limit_of_its_own(bench: Bench) -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    span = {"uses": f"{HERE}.span", "map": {"name": "$names"}, "marks": True, "max_parallel": 3}
    steps = {"names": {"uses": f"{HERE}.collect", "with": {"values": names}}, "span": span}
    bench.run(bench.project(**steps))
    assert most_at_once(spans(bench, *names)) <= 3


def test_a_step_that_takes_too_long_is_interrupted_and_may_be_tried_again(bench: Bench) -> None:
    step = {"uses": f"{HERE}.sleep", "with": {"seconds": 60}, "marks": True, "timeout": "1s"}
    began_s = time.monotonic()
    with pytest.raises(StepError, match="longer than its timeout of 1 s"):
        bench.run(bench.project(slow=step))
    assert time.monotonic() - began_s < 30
    assert bench.count("slept") == 0
    again = {
        "uses": f"{HERE}.slow_once",
        "marks": True,
        "timeout": "1s",
        "retries": {"user": 1, "backoff": {"first": "10ms"}},
    }
    assert bench.result("slow", slow=again) == "quick"


def test_a_step_that_ignores_its_timeout_is_ended_and_its_log_says_where(bench: Bench) -> None:
    step = {"uses": f"{HERE}.stubborn", "marks": True, "timeout": "1s"}
    with pytest.raises(StepError, match="did not end when interrupted"):
        bench.run(bench.project(stubborn=step))
    run = bench.ledger.runs()[0]
    log = log_path(bench.home, run.run_id, "stubborn").read_text()
    assert "in stubborn" in log


def test_steps_of_a_group_run_one_after_the_other_in_one_process(bench: Bench) -> None:
    steps: dict[str, dict[str, Any]] = {
        f"s{n}": {"uses": f"{HERE}.remember", "with": {"number": n}, "group": "warm"}
        for n in range(4)
    }
    steps["all"] = {"uses": f"{HERE}.collect", "with": {"values": [f"$s{n}" for n in range(4)]}}
    assert sorted(bench.result("all", **steps)) == [0, 1, 2, 3]


def test_a_group_whose_process_dies_gets_a_new_one(bench: Bench) -> None:
    step = {
        "uses": f"{HERE}.die_once",
        "marks": True,
        "group": "warm",
        "retries": {"infrastructure": 1, "backoff": {"first": "10ms"}},
    }
    assert isinstance(bench.result("die", die=step), int)
    (retried,) = bench.events("step_retried")
    assert retried["cause"] == "infrastructure"


def test_a_worker_that_dies_costs_infrastructure_not_the_steps_own_retries(bench: Bench) -> None:
    retries = {"user": 0, "infrastructure": 1, "backoff": {"first": "10ms"}}
    step = {"uses": f"{HERE}.die_once", "marks": True, "retries": retries}
    assert isinstance(bench.result("die", die=step), int)
    (retried,) = bench.events("step_retried")
    assert retried["cause"] == "infrastructure"
    assert "WorkerCrashedError" in retried["reason"]


def test_a_step_may_have_an_environment_of_its_own(bench: Bench, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "tinything", "4.5.6")
    steps = {
        "variable": {
            "uses": f"{HERE}.variable",
            "with": {"name": "OF_THE_STEP"},
            "environment": {"runtime": {"env_vars": {"OF_THE_STEP": "yes"}}},
        },
        "none": {"uses": f"{HERE}.variable", "with": {"name": "OF_THE_STEP"}},
        "version": {
            "uses": f"{HERE}.version_of",
            "with": {"package": "tinything"},
            "environment": {
                "runtime": {
                    "pip": {"packages": [str(wheel)], "pip_install_options": ["--no-index"]}
                }
            },
        },
    }
    record, _, executor = bench.run(bench.project(**steps))
    values = {name: executor.output(record.run_id, name) for name in steps}
    assert values == {"variable": "yes", "none": None, "version": "4.5.6"}


def make_wheel(folder: Path, name: str, version: str) -> Path:
    """Write the least that pip takes for a package."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(path, text)
    return wheel


def test_resources_of_a_step_become_what_ray_is_asked_for(bench: Bench) -> None:
    project = bench.project(
        one={
            "uses": f"{HERE}.split",
            "group": "g",
            "resources": {"num_cpus": 2, "custom": {"disk": 1.0}, "labels": {"zone": "in(a, b)"}},
        },
        two={
            "uses": f"{HERE}.split",
            "group": "g",
            "resources": {"num_gpus": 1, "memory_bytes": 5, "custom": {"disk": 3, "net": 1}},
        },
    )
    one, two = project.workflow.steps.values()
    assert _options(one) == {
        "num_cpus": 2,
        "num_gpus": 0,
        "resources": {"disk": 1.0},
        "label_selector": {"zone": "in(a, b)"},
    }
    assert _joint_options([one, two]) == {
        "num_cpus": 2,
        "num_gpus": 1,
        "memory": 5,
        "resources": {"disk": 3, "net": 1},
        "label_selector": {"zone": "in(a, b)"},
    }


def test_only_what_is_declared_is_pickled(bench: Bench) -> None:
    steps: dict[str, dict[str, Any]] = {
        "odd": {"uses": f"{HERE}.odd", "with": {"number": 3}},
        "number": {"uses": f"{HERE}.number_of", "with": {"odd": "$odd"}},
    }
    with pytest.raises(StepError, match="Odd"):
        bench.run(bench.project(**steps))
    steps["odd"]["pickle"] = True
    assert bench.result("number", **steps) == 3


def test_all_that_a_step_prints_is_kept_and_nothing_where_it_prints_nothing(bench: Bench) -> None:
    steps = {
        "shout": {"uses": f"{HERE}.shout", "with": {"number": 5}},
        "many": {"uses": f"{HERE}.shout", "map": {"number": "$split"}},
        "split": {"uses": f"{HERE}.split", "with": {"count": 2}},
    }
    record, _, _ = bench.run(bench.project(**steps))
    text = log_path(bench.home, record.run_id, "shout").read_text()
    assert text.splitlines() == ["from python 5", "from a child 5"]
    assert "child 1" in log_path(bench.home, record.run_id, "many", 1).read_text()
    assert not log_path(bench.home, record.run_id, "split").exists()


def test_progress_is_shown_while_a_step_runs_and_facts_are_kept(bench: Bench) -> None:
    seen: set[tuple[int | None, str | None]] = set()

    def listen(run: Any, steps: list[Any]) -> None:
        seen.update((step.rows, step.message) for step in steps)

    steps = {"say": {"uses": f"{HERE}.say", "with": {"seconds": 1.5}}}
    record = bench.executor(bench.project(**steps), listen).run()
    assert (8, "nearly") in seen
    (said,) = bench.events("said")
    assert said == {"seconds": 1.5, "step": "say"}
    (link,) = bench.ledger.links(run_id=record.run_id)
    assert (link.step, link.direction, link.kind, link.name) == ("say", "writes", "model", "tiny@1")
    (step,) = bench.ledger.steps(record.run_id)
    assert (step.rows, step.message, step.status) == (8, "nearly", "succeeded")
    assert step.node is not None


def test_a_run_can_be_cancelled_from_elsewhere_and_taken_up_again(bench: Bench) -> None:
    step = {"uses": f"{HERE}.slow_once", "marks": True}
    project = bench.project(slow=step)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            bench.executor(project).run()
        except WorkflowError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until_s = time.monotonic() + 60
    while not (bench.marks / "slow").exists() and time.monotonic() < until_s:
        time.sleep(0.05)
    (running,) = bench.ledger.runs()
    request_cancel(bench.ledger, running.run_id, "me")
    thread.join(60)
    assert "was cancelled" in str(caught[0])
    (cancelled,) = bench.ledger.runs()
    assert cancelled.status == "cancelled"
    assert bench.states(running.run_id) == {"slow": "cancelled"}
    record, states, _ = bench.run(project)
    assert (record.run_id, states) == (running.run_id, {"slow": "succeeded"})


def test_a_request_to_cancel_that_comes_while_a_run_begins_is_heard(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = bench.project(slow={"uses": f"{HERE}.sleep", "with": {"seconds": 60}, "marks": True})

    def ask(run: Any) -> None:
        request_cancel(bench.ledger, run.run_id, "me")

    monkeypatch.setattr(executor, "open_trace", ask)
    for _ in range(2):
        with pytest.raises(WorkflowError, match="was cancelled"):
            bench.run(project)
    assert [run.status for run in bench.ledger.runs()] == ["cancelled"]


def test_a_second_interrupt_does_not_keep_the_end_from_being_recorded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = bench.project(stubborn={"uses": f"{HERE}.stubborn", "marks": True})
    waits = Scheduler._last_successes
    asked = iter([True])

    def wait(scheduler: Scheduler, patience_s: float) -> Any:
        if next(asked, False):
            raise KeyboardInterrupt
        return waits(scheduler, patience_s)

    begun = iter([True])

    def interrupt(run: Any, steps: Any) -> None:
        if bench.count("stubborn begun") and next(begun, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "_last_successes", wait)
    with pytest.raises(KeyboardInterrupt):
        bench.executor(project, interrupt).run()
    (run,) = bench.ledger.runs()
    assert run.status == "interrupted"
    assert bench.states(run.run_id) == {"stubborn": "pending"}


def test_what_no_node_can_hold_is_refused_on_ones_own_ray(bench: Bench) -> None:
    asked = {"num_gpus": 1000, "custom": {"tape": 2}}
    step = {"uses": f"{HERE}.split", "with": {"count": 1}, "resources": asked}
    with pytest.raises(WorkflowError, match="no node of the cluster has 1000 GPU, 2 tape"):
        bench.run(bench.project(split=step))
    (run,) = bench.ledger.runs()
    assert bench.states(run.run_id) == {"split": "failed"}


def test_on_a_cluster_it_is_said_and_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "may_grow", lambda: True)
    asked = {"custom": {"tape": 2}}
    step = {"uses": f"{HERE}.split", "with": {"count": 1}, "resources": asked}

    def look(run: Any, steps: Any) -> None:
        if steps[0].status == "running" and steps[0].message == "no node of the cluster has 2 tape":
            request_cancel(bench.ledger, run.run_id, "me")

    with pytest.raises(WorkflowError, match="was cancelled"):
        bench.executor(bench.project(split=step), look).run()
    assert [said["step"] for said in bench.events("step_waits_for_node")] == ["split"]


def test_a_parameter_that_cannot_be_recorded_is_an_error_of_its_step(bench: Bench) -> None:
    with pytest.raises(StepError, match="parameter 'grid' cannot be recorded"):
        bench.run(bench.project(odd={"uses": f"{HERE}.report_odd"}))
    assert [run.status for run in bench.ledger.runs()] == ["failed"]


def test_an_error_of_the_journal_does_not_leave_a_run_running(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: Any, **__: Any) -> None:
        raise TypeError("a bug of ours")

    ran = bench.executor(
        bench.project(slow={"uses": f"{HERE}.span", "with": {"name": "a"}, "marks": True})
    )
    monkeypatch.setattr(ran._ledger, "apply", odd)
    with pytest.raises(TypeError, match="a bug of ours"):
        ran.run()
    assert [run.status for run in bench.ledger.runs()] == ["failed"]


def test_a_part_of_a_workflow_is_a_run_of_its_own(bench: Bench) -> None:
    project = bench.project(
        part={"uses": f"{HERE}.fail_once", "with": {"effect": 1}, "marks": True},
        other={"uses": f"{HERE}.split", "with": {"count": 1}},
    )
    spec = replace(RunSpec.of(project, directory=bench.marks), only=frozenset({"part"}))
    with pytest.raises(StepError, match="the first time it fails"):
        Executor(spec).run()
    whole, states, _ = bench.run(project)
    assert states == {"part": "succeeded", "other": "succeeded"}
    part = Executor(spec).run()
    assert bench.states(part.run_id) == {"part": "cached"}
    assert part.run_id != whole.run_id
    assert len(bench.ledger.runs()) == 2


def test_what_is_not_running_cannot_be_cancelled(bench: Bench) -> None:
    record, _, _ = bench.run(bench.project(split={"uses": f"{HERE}.split", "with": {"count": 1}}))
    with pytest.raises(WorkflowError, match="it is succeeded"):
        request_cancel(bench.ledger, record.run_id, "me")
    with pytest.raises(WorkflowError, match="no run"):
        request_cancel(bench.ledger, "nope", "me")


def test_a_cached_prefix_loads_no_code_of_the_project(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "code" / "loud_project"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    source = (
        f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\n\ndef one() -> int:\n    return 1\n"
    )
    (folder / "steps.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder.parent))

    def run() -> str:
        project = bench.project(
            one={"uses": "loud_project.steps.one"},
            add={"uses": f"{HERE}.add", "with": {"values": ["$one"]}},
        ).model_copy(update={"allow": ("orchestration", "loud_project")})
        from mlops_ray.orchestration.executor import Executor
        from mlops_ray.orchestration.spec import RunSpec

        spec = RunSpec.of(project, directory=bench.marks, roots=(str(folder.parent),))
        return bench.states(Executor(spec).run().run_id)["one"]

    assert run() == "succeeded"
    assert (tmp_path / "imports").read_text() == "x"
    assert run() == "cached"
    assert (tmp_path / "imports").read_text() == "x"
