"""Effects that must not happen twice, whoever dies when."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from orchestration.driver import spec_of

from mlops_ray.errors import LedgerError, StepError, WorkflowError
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.records import Event
from mlops_ray.orchestration import once
from mlops_ray.orchestration.executor import Executor
from mlops_ray.orchestration.ownership import borrowed
from mlops_ray.orchestration.worker import Call, Job

HERE = "orchestration.sample_steps"


class Stage:
    """A home, and drivers in processes of their own on the Ray of the session."""

    def __init__(self, home: Home, marks: Path, address: str) -> None:
        self.home = home
        self.marks = marks
        self.address = address
        self.drivers: list[subprocess.Popen[str]] = []

    def steps(self, seconds: float, **effect: Any) -> dict[str, Any]:
        given = {"marks": str(self.marks), "seconds": seconds}
        step = {"uses": f"{HERE}.sleep", "with": given, "mode": "effect", "idempotent": False}
        return {
            "effect": step | effect,
            "then": {"uses": f"{HERE}.collect", "with": {"values": ["$effect"]}},
        }

    def start(self, steps: dict[str, Any]) -> subprocess.Popen[str]:
        tests = Path(__file__).parent.parent
        path = os.pathsep.join([str(tests), str(tests.parent)])
        driver = subprocess.Popen(
            [sys.executable, "-m", "orchestration.driver", str(self.home.root), json.dumps(steps)],
            env=os.environ | {"PYTHONPATH": path, "RAY_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.drivers.append(driver)
        return driver

    def run(self, steps: dict[str, Any]) -> Any:
        return Executor(spec_of(self.home.root, steps)).run()

    def count(self, name: str) -> int:
        file = self.marks / name
        return len(file.read_text()) if file.exists() else 0

    @property
    def ledger(self) -> Any:
        return open_ledger(self.home)

    def states(self) -> dict[str, str]:
        (run,) = self.ledger.runs()
        return {step.name: step.status for step in self.ledger.steps(run.run_id)}


@pytest.fixture
def stage(ray_cluster: Any, home: Home, tmp_path: Path) -> Iterator[Stage]:
    home.root.mkdir()
    marks = tmp_path / "marks"
    marks.mkdir()
    made = Stage(home, marks, ray_cluster.get_runtime_context().gcs_address)
    yield made
    for driver in made.drivers:
        driver.kill()
        driver.wait()


def wait_for(happens: Callable[[], bool], patience_s: float = 60) -> None:
    until_s = time.monotonic() + patience_s
    while not happens():
        assert time.monotonic() < until_s, "it did not happen"
        time.sleep(0.05)


def answer_of(driver: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a driver printed last; Ray prints warnings before."""
    answer: dict[str, Any] = json.loads(driver.communicate(timeout=90)[0].splitlines()[-1])
    return answer


def effect_process(stage: Stage) -> int:
    from ray.util.state import list_actors

    (run,) = stage.ledger.runs()
    name = once.actor_name(run.run_id, "effect", Call())
    (found,) = list_actors(filters=[("name", "=", name), ("state", "=", "ALIVE")])
    return int(found.pid)


def test_an_effect_goes_on_without_its_driver_and_the_next_driver_waits_for_it(
    stage: Stage,
) -> None:
    steps = stage.steps(seconds=6)
    driver = stage.start(steps)
    wait_for(lambda: stage.count("slept begun") == 1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert stage.count("slept") == 0
    run = stage.run(steps)
    assert run.status == "succeeded"
    assert (stage.count("slept begun"), stage.count("slept")) == (1, 1)
    kinds = [event.kind for event in stage.ledger.events(run_id=run.run_id)]
    assert kinds.count(once.BEGUN) == kinds.count(once.OVER) == 1
    assert "effect_taken_up" in kinds


def test_an_effect_that_ended_while_nobody_drove_is_known_to_be_done(stage: Stage) -> None:
    steps = stage.steps(seconds=2)
    driver = stage.start(steps)
    wait_for(lambda: stage.count("slept begun") == 1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: stage.states()["effect"] == "succeeded")
    assert stage.run(steps).status == "succeeded"
    assert stage.count("slept begun") == 1


@pytest.mark.parametrize("decision", ["done", "rerun"])
def test_of_an_effect_that_was_killed_a_person_has_to_say(
    stage: Stage, decision: once.Decision
) -> None:
    steps = stage.steps(seconds=2)
    steps["effect"]["with"]["seconds"] = 60 if decision == "done" else 5
    driver = stage.start(steps)
    wait_for(lambda: stage.count("slept begun") == 1)
    os.kill(effect_process(stage), signal.SIGKILL)
    answer = answer_of(driver)
    assert answer["error"] == "WorkflowError"
    (run,) = stage.ledger.runs()
    assert f"mlops-ray resolve {run.run_id} effect --done" in answer["text"]
    assert stage.states() == {"effect": "uncertain", "then": "pending"}
    with pytest.raises(WorkflowError, match="not known whether step effect has happened"):
        stage.run(steps)
    assert stage.count("slept begun") == 1
    with borrowed(stage.ledger, run) as lease:
        artifacts = open_artifacts(stage.home)
        kept = {"done": "done", "rerun": "rerun"}[decision]
        once.resolve(stage.ledger, artifacts, run, "effect", -1, kept, output=7.5, fence=lease)
    if decision == "done":
        steps["effect"]["with"]["name"] = "another"  # another key: it has happened nevertheless
    executor = Executor(spec_of(stage.home.root, steps))
    done = executor.run()
    expected = [7.5] if decision == "done" else [5.0]
    assert executor.output(done.run_id, "then") == expected
    assert stage.count("slept begun") == (1 if decision == "done" else 2)
    assert stage.count("another begun") == 0


def test_an_effect_that_raises_is_over_and_may_be_tried_again(stage: Stage) -> None:
    marks = str(stage.marks)
    steps = {
        "effect": {
            "uses": f"{HERE}.fail_once",
            "with": {"marks": marks, "effect": 1},
            "mode": "effect",
            "idempotent": False,
        }
    }
    with pytest.raises(StepError, match="the first time it fails"):
        stage.run(steps)
    assert stage.run(steps).status == "succeeded"
    assert stage.count("after") == 1


def test_a_mapped_effect_happens_once_for_each_element(stage: Stage) -> None:
    steps = {
        "split": {"uses": f"{HERE}.split", "with": {"count": 3}},
        "effect": {
            "uses": f"{HERE}.square_once_broken",
            "with": {"marks": str(stage.marks)},
            "map": {"number": "$more"},
            "mode": "effect",
            "idempotent": False,
            "max_parallel": 1,
        },
        "more": {"uses": f"{HERE}.collect", "with": {"values": ["$split.0", "$split.1", 3, 2]}},
    }
    with pytest.raises(StepError, match="call 2: ValueError"):
        stage.run(steps)
    run = stage.run(steps)
    calls = stage.ledger.items(run.run_id, "effect")
    assert [call.status for call in calls] == ["succeeded"] * 4
    assert [stage.count(f"square {n}") for n in range(4)] == [1, 1, 1, 1]


def test_only_an_uncertain_step_can_be_resolved(stage: Stage) -> None:
    run = stage.run(stage.steps(seconds=0))
    with borrowed(stage.ledger, run) as lease, pytest.raises(WorkflowError, match="not uncertain"):
        once.resolve(
            stage.ledger, open_artifacts(stage.home), run, "effect", -1, "rerun", fence=lease
        )


@pytest.fixture
def effect(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[once.Effect, Any]:
    """The actor's object in this process, and a function that makes a pickled job of a step."""
    monkeypatch.setattr(once, "_end_after", lambda _s: threading.Timer(1, lambda: None))
    inputs = {"marks": str(tmp_path)}
    return once.Effect(), lambda step: pickle.dumps(
        Job("p", home, "r", "s", f"{HERE}.{step}", inputs, packages=("orchestration",))
    )


CALLS = pickle.dumps((Call(),))


def test_an_effect_that_could_not_say_that_it_is_over_does_not_happen_again(
    effect: tuple[once.Effect, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise LedgerError("it is away")

    with monkeypatch.context() as patch:
        patch.setattr(once, "_record", away)
        with pytest.raises(LedgerError):
            effect[0].run(effect[1]("effect"), CALLS)
    with pytest.raises(LedgerError):
        effect[0].run(effect[1]("effect"), CALLS)
    assert (tmp_path / "effect").read_text() == "x"


def test_whatever_an_effect_raises_it_is_over(
    effect: tuple[once.Effect, Any], home: Home, tmp_path: Path
) -> None:
    for _ in range(2):
        (outcome,) = pickle.loads(effect[0].run(effect[1]("give_up"), CALLS))
        assert outcome.error.what == "CancelledError: nope"
    assert (tmp_path / "give_up").read_text() == "x"
    assert once.standings_in(open_ledger(home), "r")["s", -1].over


def test_an_effects_own_process_records_all_that_its_driver_would(
    effect: tuple[once.Effect, Any], home: Home
) -> None:
    effect[0].run(effect[1]("announce"), CALLS)
    ledger = open_ledger(home)
    (link,) = ledger.links(run_id="r")
    assert (link.step, link.direction, link.name) == ("s", "writes", "m@1")
    (record,) = ledger.steps("r")
    assert (record.rows, record.message, record.status) == (7, "sent", "succeeded")


def event(kind: str, attempt: int, item: int = -1) -> Event:
    data = {"item": item, "attempt": attempt}
    return Event.model_validate(
        {
            "id": 1,
            "at": "2026-01-01T00:00:00Z",
            "project": "p",
            "run_id": "r",
            "step": "s",
            "kind": kind,
            "data": data,
        }
    )


def test_the_last_event_of_an_effect_says_how_far_it_got() -> None:
    events = [
        event(once.BEGUN, 1),
        event(once.OVER, 1),
        event(once.BEGUN, 2),
        event(once.BEGUN, 1, item=4),
        event(once.OVER, 1, item=4),
        event("other", 9),
    ]
    assert once.standings(events) == {
        ("s", -1): once.Standing(2, over=False),
        ("s", 4): once.Standing(1, over=True),
    }


@pytest.mark.parametrize("called", [False, True])
def test_an_effect_whose_driver_is_gone_ends_itself(called: bool, tmp_path: Path) -> None:
    code = (
        "import pickle, sys, time\n"
        "from mlops_ray.orchestration import once\n"
        "once._UNCALLED_S = once._LINGER_S = 0.2\n"
        "once._perform = lambda job, call: 'done'\n"
        "once.unpacked = lambda job: job\n"
        "effect = once.Effect()\n"
        f"{called} and effect.run(b'', pickle.dumps([None]))\n"
        "time.sleep(60); sys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


def test_an_effect_that_goes_on_while_its_input_is_lost_does_not_happen_again(
    stage: Stage,
) -> None:
    steps = stage.steps(seconds=4)
    steps["chance"] = {"uses": f"{HERE}.chance", "with": {"marks": str(stage.marks)}}
    steps["effect"]["with"]["name"] = "$chance"
    driver = stage.start(steps)
    wait_for(lambda: bool(list(stage.marks.glob("* begun"))))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    (run,) = stage.ledger.runs()
    (chance,) = (s for s in stage.ledger.steps(run.run_id) if s.name == "chance")
    open_artifacts(stage.home).path(chance.output.digest).unlink()
    with pytest.raises(WorkflowError, match="its inputs are others now"):
        stage.run(steps)
    assert stage.states()["effect"] == "uncertain"
    assert stage.count("chance") == 2
    assert len(list(stage.marks.glob("* begun"))) == 1
