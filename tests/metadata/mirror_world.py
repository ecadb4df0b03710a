"""Runs to be mirrored, and what MLflow must show of them, found out in another way."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from mlops_ray.metadata.artifacts import ArtifactRef, open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Link, NewKey, RunRecord, StepChange

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
PROJECT = "shop"
END = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


def add_run(home: Home, number: int, steps: int = 6) -> str:
    """Record a run that is over, with steps of all kinds; return its id."""
    chance = random.Random(number)
    ledger, artifacts = Ledger(home.ledger_url), open_artifacts(home)
    run_id = f"20260301-1200{number:02d}-{number:04x}"
    at = NOON + timedelta(hours=number)
    names = [f"step{index}" for index in range(steps)]
    ledger.start_run(_run(run_id, at), names)
    table = artifacts.put(pa.table({"n": [1, 2, number], "s": ["a", "b", None]}))
    writes: list[Any] = []
    for index, name in enumerate(names):
        status = chance.choice(["succeeded", "cached", "skipped", "failed"])
        status = "succeeded" if index == 0 else status
        key = f"{run_id}/{name}"
        values: dict[str, Any] = {
            "status": status,
            "key": key,
            "attempt": 0 if status in ("cached", "skipped") else chance.randint(1, 3),
            "started_at": None if status in ("cached", "skipped") else at,
            "ended_at": at + timedelta(seconds=chance.randint(1, 50)),
            "metrics": {"auc": chance.random()} if status != "skipped" else {},
            "params": {"note": f"{number}-{index}"},
            "message": "$gate.passed is false" if status == "skipped" else None,
            "error": "ValueError: no" if status == "failed" else None,
        }
        if status in ("succeeded", "cached"):
            values |= {"output": table, "rows": 3}
        writes.append(StepChange(run_id=run_id, name=name, values=values))
        writes.append(NewKey(key=key, parts=_parts(index, table)))
    writes += [
        StepChange(run_id=run_id, name="step0", item=item, values={"status": status})
        for item, status in enumerate(["succeeded", "succeeded", "cached"])
    ]
    writes.append(
        Link(run_id=run_id, step="step0", direction="reads", kind="view", name="weather@14")
    )
    writes.append(
        Link(run_id=run_id, step="step0", direction="writes", kind="model", name="shop@1")
    )
    ledger.apply(writes)
    ledger.finish_run(run_id, chance.choice(list(END)))  # type: ignore[arg-type]
    ledger.close()
    return run_id


def _run(run_id: str, at: datetime) -> RunRecord:
    return RunRecord(
        run_id=run_id,
        project=PROJECT,
        workflow="train",
        status="running",
        config_digest="c0ffee",
        started_at=at,
        ended_at=None,
        owner="host:1:2",
        config={"seed": 3, "model": {"width": 64}},
        provenance={"commit": "abc", "seed": 3, "user": "ada", "changes": None},
        reason="trigger nightly",
    )


def _parts(index: int, table: ArtifactRef) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "training": {"config": {"epochs": 2 + index, "optimizer": {"name": "adam"}}},
        "seed": {"config": 3},
        "large": {"config": {f"key{number}": number for number in range(80)}},
    }
    if index:
        inputs["data"] = {"step": "step0", "digest": table.digest}
    return {"target": "shop.steps.fit", "inputs": inputs}


def check(home: Home) -> int:
    """Compare what MLflow's own client shows with the ledger; return the number of runs shown.

    Every run that is over is there once, with each of its steps once, complete.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=home.tracking_uri)
    ledger = Ledger(home.ledger_url)
    experiment = client.get_experiment_by_name(PROJECT)
    shown: dict[tuple[str, str], Any] = {}
    token = None
    while True:
        page = client.search_runs([experiment.experiment_id], page_token=token)
        for run in page:
            tags = run.data.tags
            place = tags["mlops_ray.run_id"], tags["mlops_ray.step"]
            assert place not in shown, f"{place} is there twice"
            shown[place] = run
        token = page.token
        if not token:
            break
    expected = 0
    for run in ledger.runs(limit=1000):
        parent = shown[run.run_id, ""]
        expected += 1
        assert parent.info.status == END[run.status]
        assert parent.data.params["seed"] == "3"
        for step in ledger.steps(run.run_id):
            expected += 1
            _check_step(shown[run.run_id, step.name], step, parent.info.run_id)
    assert len(shown) == expected
    return expected


def _check_step(run: Any, step: Any, parent: str) -> None:
    data, tags = run.data, run.data.tags
    assert tags["mlflow.parentRunId"] == parent
    assert tags["mlops_ray.status"] == step.status
    assert tags["mlops_ray.key"] == step.key
    ended = {"skipped": "KILLED", "failed": "FAILED"}.get(step.status, "FINISHED")
    assert run.info.status == ended
    assert run.info.end_time == step.ended_at.timestamp() * 1000
    assert data.params["note"] == step.params["note"]
    assert data.params["training.epochs"] == str(2 + step.position)
    assert data.params["training.optimizer.name"] == "adam"
    assert data.params["large"].startswith('{"key0": 0')
    assert data.metrics["attempts"] == step.attempt
    assert data.metrics["cache_hit"] == (step.status == "cached")
    assert data.metrics.get("auc") == step.metrics.get("auc")
    assert data.metrics.get("rows") == step.rows
    uses = sorted(given.tags[0].value for given in run.inputs.dataset_inputs)
    expected = ["input"] if step.position else []
    # MLflow keeps one use for each dataset of a run; here, both are the same table.
    if step.output is not None:
        expected.append("output")
    assert uses == expected
