"""The verbs ``triggers …`` as a person uses them, without a cluster."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger

TRIGGERS = """
triggers:
  nightly: {workflow: train, cron: "0 3 * * *", timezone: Europe/Berlin}
  code:
    workflow: train
    commit: main
  button: {workflow: train}
"""


@pytest.fixture
def project(command: Any, tmp_path: Path) -> Path:
    """A project with three triggers, in whose folder commands run."""
    assert command("init", "shop", "--directory", str(tmp_path / "shop")).code == 0
    file = tmp_path / "shop" / "configs" / "project" / "shop.yaml"
    file.write_text(file.read_text() + TRIGGERS)
    return tmp_path / "shop"


def run(command: Any, project: Path, *arguments: str) -> Any:
    return command("-C", str(project), *arguments)


def listed(command: Any, project: Path) -> dict[str, dict[str, Any]]:
    outcome = run(command, project, "triggers", "list", "--json")
    return {row["trigger"]: row for row in json.loads(outcome.out)["triggers"]}


def test_list_says_when_each_fires_next(command: Any, project: Path) -> None:
    rows = listed(command, project)
    assert set(rows) == {"nightly", "code", "button"}
    upcoming = datetime.fromisoformat(rows["nightly"]["next"])
    assert upcoming.astimezone(ZoneInfo("Europe/Berlin")).hour == 3
    assert upcoming > datetime.now(ZoneInfo("UTC"))
    assert rows["code"]["next"] is None
    shown = run(command, project, "triggers", "list")
    assert "commit main" in shown.out
    assert "nobody watches" in shown.out


def test_pause_and_resume(command: Any, project: Path) -> None:
    assert run(command, project, "triggers", "pause", "nightly").code == 0
    paused = listed(command, project)["nightly"]
    assert (paused["status"], paused["next"]) == ("paused", None)
    run(command, project, "triggers", "resume", "nightly")
    assert listed(command, project)["nightly"]["status"] is None


def test_a_firing_by_hand_is_kept_until_somebody_watches(command: Any, project: Path) -> None:
    outcome = run(command, project, "triggers", "fire", "button")
    assert "runs when somebody watches" in outcome.out
    ledger = Ledger(Home(project / ".mlops-ray").ledger_url)
    (firing,) = ledger.firings(status="due")
    (event,) = ledger.events(kind="firing_due")
    assert event.data["firing"] == firing.key
    assert firing.key in outcome.out
    history = json.loads(run(command, project, "triggers", "history", "button", "--json").out)
    assert [(f["key"], f["status"]) for f in history] == [(firing.key, "due")]
    assert json.loads(run(command, project, "triggers", "history", "code", "--json").out) == []
    assert "by hand" in run(command, project, "triggers", "history").out


def test_an_unknown_trigger_is_answered_with_the_known_ones(command: Any, project: Path) -> None:
    outcome = run(command, project, "triggers", "fire", "nigthly")
    assert outcome.code == 1
    assert "nightly, code, button" in outcome.err


def test_stop_needs_a_cluster(command: Any, project: Path) -> None:
    outcome = run(command, project, "triggers", "stop")
    assert outcome.code == 1
    assert "Ctrl-C" in outcome.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("workflow: train, cron", "workflow: trian, cron", "Did you mean train?"),
        ("0 3 * * *", "0 30 * * *", "Bad hour"),
        ("Europe/Berlin", "Europe/Berlim", "Did you mean Europe/Berlin?"),
        ("timezone: Europe/Berlin", "timzone: UTC", "Did you mean timezone?"),
        ("commit: main", "data: lodes", "there is no feature view 'lodes'"),
        ("commit: main", "after: {workflow: train}", "start each other for ever"),
        ("commit: main", "overlap: allow", "until={at}"),
        ("commit: main", "event: firing_due", "would start itself for ever"),
        ("commit: main", "after: {workflow: nightly}", "says name: night_train"),
    ],
)
def test_check_finds_what_is_wrong_and_where(
    command: Any, project: Path, old: str, new: str, message: str
) -> None:
    folder = project / "configs" / "workflow"
    folder.mkdir(exist_ok=True)
    (folder / "nightly.yaml").write_text("name: night_train\nsteps: {}\n")
    file = project / "configs" / "project" / "shop.yaml"
    text = file.read_text().replace(old, new)
    file.write_text(text)
    outcome = run(command, project, "check")
    assert outcome.code == 2
    (problem,) = [line for line in outcome.err.splitlines() if "triggers." in line]
    assert message in problem
    line = int(problem.split("shop.yaml:")[1].split(" ")[0])
    around = "\n".join(text.splitlines()[line - 1 : line + 2])
    assert new in around


def test_a_repair_is_no_ring(command: Any, project: Path) -> None:
    file = project / "configs" / "project" / "shop.yaml"
    declared = """
  fix: {workflow: tune, after: {workflow: train, status: failed}}
  again: {workflow: train, after: {workflow: tune, status: STATUS}}
"""
    text = file.read_text().rstrip("\n")
    file.write_text(text + declared.replace("STATUS", "succeeded"))
    assert run(command, project, "check").code == 0
    file.write_text(text + declared.replace("STATUS", "any"))
    assert "start each other for ever" in run(command, project, "check").err
