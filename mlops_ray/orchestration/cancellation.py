"""Asking for the end of a run that runs elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime

from mlops_ray.errors import LeaseError, WorkflowError
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Lease, NewEvent, RunRecord, StepChange
from mlops_ray.orchestration.ownership import borrowed

CANCEL = "cancel_requested"
"""The kind of event that asks the owner of a run to end it."""


def request_cancel(ledger: Ledger, run_id: str, by: str) -> RunRecord:
    """Ask the owner of a run to end it, and return the run as it is then; where the owner is dead,
    enter its end.

    Args:
        ledger: Where the run is.
        run_id: The run.
        by: Who asks.

    Raises:
        WorkflowError: There is no such run, or it is not running.
    """
    run = ledger.run(run_id)
    if run is None:
        raise WorkflowError(f"there is no run {run_id!r}", fix="list them: mlops-ray status")
    if run.status != "running":
        raise WorkflowError(f"run {run_id} is not running", why=f"it is {run.status}")
    ledger.append(run.project, CANCEL, {"by": by}, run_id=run_id)
    try:
        with borrowed(ledger, run) as lease:
            _enter_end(ledger, run, lease)
            ledger.finish_run(run_id, "cancelled", fence=lease)
    except LeaseError:
        return run  # it is alive, and will see the event
    return ledger.run(run_id) or run


def _enter_end(ledger: Ledger, run: RunRecord, lease: Lease) -> None:
    cut_off = [step.name for step in ledger.steps(run.run_id) if step.status == "running"]
    values = {
        "status": "cancelled",
        "message": "its driver was gone",
        "ended_at": datetime.now(UTC),
    }
    changes = [StepChange(run_id=run.run_id, name=name, values=values) for name in cut_off]
    event = NewEvent(project=run.project, kind="run_cancelled", run_id=run.run_id)
    ledger.apply([*changes, event], fence=lease)
