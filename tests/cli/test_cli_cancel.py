"""The verbs ``cancel`` and ``resolve`` where no driver is there any more."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlops_ray.cli.main import cli
from mlops_ray.errors import MlopsRayError, WorkflowError
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import RunRecord, StepChange


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    home = Home(tmp_path / "home")
    monkeypatch.setenv("MLOPS_RAY_HOME", str(home.root))
    made = Ledger(home.ledger_url)
    record = RunRecord(
        run_id="run-1",
        project="p",
        workflow="w",
        status="running",
        config_digest="c" * 64,
        started_at=datetime.now(UTC),
        ended_at=None,
        owner="somebody",
        config={},
        provenance={},
    )
    made.start_run(record, ["send", "after"])
    return made


def set_status(ledger: Ledger, step: str, status: str) -> None:
    values = {"status": status, "attempt": 3}
    ledger.apply([StepChange(run_id="run-1", name=step, values=values)])


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_run_without_a_driver_is_cancelled_on_the_spot(ledger: Ledger) -> None:
    set_status(ledger, "send", "running")
    assert invoke("cancel", "run-1") == "run run-1: cancelled\n"
    assert [step.status for step in ledger.steps("run-1")] == ["cancelled", "pending"]
    kinds = [event.kind for event in ledger.events(run_id="run-1")]
    assert kinds == ["cancel_requested", "run_cancelled"]
    with pytest.raises(WorkflowError, match="it is cancelled"):
        invoke("cancel", "run-1")


def test_a_run_whose_owner_may_be_alive_is_asked_and_waited_for(ledger: Ledger) -> None:
    ledger.acquire(f"p/w/{'c' * 16}", "elsewhere/abcdef:1:1:1", 60)
    with pytest.raises(MlopsRayError, match="has not ended yet"):
        invoke("cancel", "run-1", "--wait", "1")
    assert [event.kind for event in ledger.events(run_id="run-1")] == ["cancel_requested"]


def test_a_person_says_that_an_effect_was_done_and_what_it_gave(ledger: Ledger) -> None:
    set_status(ledger, "send", "uncertain")
    invoke("resolve", "run-1", "send", "--done", "--output", '{"sent": 12}')
    (send, _) = ledger.steps("run-1")
    assert send.status == "succeeded"
    assert send.output is not None
    artifacts = open_artifacts(Home(Path(os.environ["MLOPS_RAY_HOME"])))
    assert artifacts.get(send.output) == {"sent": 12}
    (over,) = ledger.events(run_id="run-1", kind="effect_over")
    assert over.data == {"item": -1, "attempt": 3, "status": "done"}


def test_a_person_says_that_an_effect_has_to_run_again(ledger: Ledger) -> None:
    set_status(ledger, "send", "uncertain")
    assert invoke("resolve", "run-1", "send", "--rerun") == "send: will run again\n"
    assert ledger.steps("run-1")[0].status == "pending"
    with pytest.raises(WorkflowError, match="not uncertain"):
        invoke("resolve", "run-1", "send", "--rerun")


@pytest.mark.parametrize(
    "arguments",
    [[], ["--rerun", "--output", "1"], ["--done", "--output", "{"]],
)
def test_what_is_said_must_make_sense(ledger: Ledger, arguments: list[str]) -> None:
    set_status(ledger, "send", "uncertain")
    result = CliRunner().invoke(cli, ["resolve", "run-1", "send", *arguments])
    assert result.exit_code == 2
    assert ledger.steps("run-1")[0].status == "uncertain"


def test_a_run_that_may_be_running_is_not_resolved(ledger: Ledger) -> None:
    set_status(ledger, "send", "uncertain")
    ledger.acquire(f"p/w/{'c' * 16}", "elsewhere/abcdef:1:1:1", 60)
    with pytest.raises(MlopsRayError, match="belongs to another"):
        invoke("resolve", "run-1", "send", "--done")
    assert ledger.steps("run-1")[0].status == "uncertain"
