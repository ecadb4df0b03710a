"""The ledger: runs, steps, events; several processes; and the MLflow mirror of it."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger, RunRecord
from mlops_ray.metadata.mirror import mirror
from mlops_ray.metadata.provenance import collect

REF = ArtifactRef(digest="d" * 64, kind="json", size=2, rows=None)


def record(run_id: str = "r1") -> RunRecord:
    return RunRecord(
        run_id=run_id,
        project="shop",
        workflow="train",
        status="running",
        config_digest="c",
        started_at=datetime.now(UTC),
        ended_at=None,
        owner="host:1:2",
        config={"a": [1]},
        provenance={"commit": "abc", "seed": 0},
    )


@pytest.fixture
def ledger(home: Home) -> Ledger:
    return Ledger(home.ledger_url)


def test_a_run_and_its_steps_come_back_as_written(ledger: Ledger) -> None:
    written = record()
    ledger.start_run(written, ["a", "b"])
    assert ledger.run("r1") == written
    assert [(s.name, s.status) for s in ledger.steps("r1")] == [("a", "pending"), ("b", "pending")]
    ledger.update_step(
        "r1", "a", status="succeeded", key="k", output=REF, ended_at=datetime.now(UTC), rows=7
    )
    step = ledger.steps("r1")[0]
    assert (step.output, step.rows, step.key) == (REF, 7, "k")
    ledger.finish_run("r1", "succeeded")
    finished = ledger.run("r1")
    assert finished is not None
    assert finished.status == "succeeded"
    assert finished.ended_at is not None


def test_the_newest_finished_step_with_a_key_is_found(ledger: Ledger) -> None:
    for number, run_id in enumerate(("r1", "r2", "r3")):
        ledger.start_run(record(run_id), ["a"])
        status = "failed" if run_id == "r3" else "succeeded"
        ref = REF.model_copy(update={"size": number})
        ended = datetime(2020, 1, 1 + number, tzinfo=UTC)
        ledger.update_step(run_id, "a", status=status, key="k", output=ref, ended_at=ended)
    found = ledger.cached("k")
    assert found is not None
    assert found.run_id == "r2"
    assert ledger.cached("other") is None


def test_events_keep_their_order_and_are_filtered(ledger: Ledger) -> None:
    for number in range(3):
        ledger.append("shop", "drift", {"n": number}, run_id="r1" if number else None)
    ledger.append("other", "drift", {})
    assert [event.data["n"] for event in ledger.events(project="shop")] == [0, 1, 2]
    assert [event.data["n"] for event in ledger.events(run_id="r1", kind="drift")] == [1, 2]


_WRITER = """
import sys
from mlops_ray.metadata.ledger import Ledger
ledger = Ledger(sys.argv[1])
for number in range(50):
    ledger.append("shop", "count", {"by": sys.argv[2], "n": number})
"""


def test_processes_that_open_and_write_at_once_lose_nothing(home: Home) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, home.ledger_url, str(index)])
        for index in range(4)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    events = Ledger(home.ledger_url).events(project="shop")
    assert len(events) == 200
    for index in range(4):
        mine = [event.data["n"] for event in events if event.data["by"] == str(index)]
        assert mine == list(range(50))


def test_mlflow_shows_the_run_its_steps_and_no_doubles(home: Home, ledger: Ledger) -> None:
    from mlflow import MlflowClient

    ledger.start_run(record(), ["fit", "gate"])
    ledger.update_step(
        "r1",
        "fit",
        status="succeeded",
        started_at=datetime(2020, 1, 1, tzinfo=UTC),
        ended_at=datetime(2020, 1, 1, 0, 1, tzinfo=UTC),
        metrics={"auc": 0.7},
        params={"epochs": 3},
        output=REF,
    )
    ledger.update_step("r1", "gate", status="skipped", ended_at=datetime.now(UTC))
    ledger.finish_run("r1", "succeeded")
    assert mirror(home) == 1
    assert mirror(home) == 0
    client = MlflowClient(tracking_uri=home.tracking_uri)
    experiment = client.get_experiment_by_name("shop")
    runs = client.search_runs([experiment.experiment_id])
    by_step = {run.data.tags["mlops_ray.step"]: run for run in runs}
    assert sorted(by_step) == ["", "fit", "gate"]
    assert len(runs) == 3
    fit = by_step["fit"]
    assert fit.data.metrics == {"auc": 0.7, "duration_s": 60.0}
    assert fit.data.params == {"epochs": "3"}
    assert fit.data.tags["mlflow.parentRunId"] == by_step[""].info.run_id
    assert by_step[""].data.tags["mlflow.source.git.commit"] == "abc"
    assert by_step[""].info.status == "FINISHED"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_folder_that_was_shipped_is_what_the_sender_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"commit": "abc", "dirty_digest": "clean"}
    monkeypatch.setenv("MLOPS_RAY_SOURCE", json.dumps(told))
    assert collect(tmp_path, "c", 0) | told == collect(tmp_path, "c", 0)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "first", "--allow-empty")
    assert collect(tmp_path, "c", 0)["commit"] != "abc"


def test_provenance_tells_clean_from_dirty(tmp_path: Path) -> None:
    assert collect(tmp_path, "c", 0)["commit"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = collect(tmp_path, "c", 0)
    assert len(clean["commit"]) == 40
    assert clean["dirty_digest"] == "clean"
    (tmp_path / "a.py").write_text("2")
    changed = collect(tmp_path, "c", 0)["dirty_digest"]
    (tmp_path / "new.py").write_text("3")
    added = collect(tmp_path, "c", 0)["dirty_digest"]
    assert len({"clean", changed, added}) == 3
