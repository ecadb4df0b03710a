"""The MLflow mirror: each run of a workflow a parent run, each of its steps a child run.

The ledger is the truth; this is a view of it for people who use MLflow's pages and client. A run is
mirrored once it is over, in batches; what MLflow missed, the next run catches up on, without doubles.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from mlops_ray.metadata import tracking
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import MIRRORED, Ledger, RunRecord, StepRecord

RUN_TAG = "mlops_ray.run_id"
STEP_TAG = "mlops_ray.step"
_PARENT_TAG = "mlflow.parentRunId"
_LONGEST_PARAM = 500
_STATUS = {"succeeded": "FINISHED", "cached": "FINISHED", "skipped": "KILLED", "failed": "FAILED"}


def mirror(home: Home) -> int:
    """Write every run that is over and not in MLflow yet, with its steps; return how many.

    Raises:
        mlflow.exceptions.MlflowException: The tracking store refuses. The next call goes on.
    """
    ledger = open_ledger(home)
    pending = ledger.unmirrored()
    if pending:
        client = tracking.connect(home)
        for run in pending:
            _mirror_run(client, home, ledger, run)
            ledger.append(run.project, MIRRORED, {"status": run.status}, run_id=run.run_id)
    return len(pending)


def _mirror_run(client: Any, home: Home, ledger: Ledger, run: RunRecord) -> None:
    experiment = tracking.experiment(client, home, run.project)
    run_id = run.run_id
    parent = _mirrored(client, experiment, run_id, None)
    if parent is None:
        parent = _create_parent(client, experiment, run)
    for step in ledger.steps(run_id):
        if step.status in _STATUS and _mirrored(client, experiment, run_id, step.name) is None:
            _create_child(client, experiment, parent, run, step)
    status = "FINISHED" if run.status == "succeeded" else "FAILED"
    client.set_terminated(parent, status, _milliseconds(run.ended_at))


def _mirrored(client: Any, experiment: str, run_id: str, step: str | None) -> str | None:
    query = f"tags.`{RUN_TAG}` = '{run_id}' and tags.`{STEP_TAG}` = '{step or ''}'"
    found = client.search_runs([experiment], query, max_results=1)
    return found[0].info.run_id if found else None


def _create_parent(client: Any, experiment: str, run: RunRecord) -> str:
    tags = {RUN_TAG: run.run_id, STEP_TAG: "", "mlflow.runName": f"{run.workflow} {run.run_id}"}
    tags |= {f"mlops_ray.{key}": _text(value) for key, value in run.provenance.items()}
    if run.provenance.get("commit"):
        tags["mlflow.source.git.commit"] = run.provenance["commit"]
    made = client.create_run(experiment, _milliseconds(run.started_at), tags)
    return str(made.info.run_id)


def _create_child(
    client: Any, experiment: str, parent: str, run: RunRecord, step: StepRecord
) -> None:
    from mlflow.entities import Metric, Param

    tags = {
        RUN_TAG: run.run_id,
        STEP_TAG: step.name,
        _PARENT_TAG: parent,
        "mlflow.runName": step.name,
        "mlops_ray.status": step.status,
        "mlops_ray.key": step.key or "",
        "mlops_ray.output": step.output.digest if step.output else "",
    }
    made = client.create_run(experiment, _milliseconds(step.started_at or run.started_at), tags)
    end = _milliseconds(step.ended_at or run.ended_at) or 0
    metrics = [Metric(name, value, end, 0) for name, value in step.metrics.items()]
    if step.started_at and step.ended_at and step.status == "succeeded":
        seconds = (step.ended_at - step.started_at).total_seconds()
        metrics.append(Metric("duration_s", seconds, end, 0))
    params = [Param(name, _text(value)) for name, value in step.params.items()]
    client.log_batch(made.info.run_id, metrics=metrics, params=params)
    client.set_terminated(made.info.run_id, _STATUS[step.status], end)


def _milliseconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1000)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:_LONGEST_PARAM]
