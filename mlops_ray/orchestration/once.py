"""Effects that must not happen twice: each runs in an actor that outlives its driver.

The actor says durably that the effect begins, under the lease of the run that wants it, and that it is
over, before it answers. So an effect that is over is known to be; one that has begun and is not over
is still running in its actor, or it is *uncertain*: only a person can say whether it happened.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlops_ray.errors import LedgerError, WorkflowError
from mlops_ray.metadata.artifacts import ArtifactStore
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Event, Lease, NewEvent, RunRecord, StepChange, StepRecord
from mlops_ray.orchestration.reporting import ledger_of
from mlops_ray.orchestration.worker import Call, Job, Outcome, perform, unpacked

NAMESPACE = "mlops_ray_effects"
BEGUN = "effect_begun"
OVER = "effect_over"
_RECORD_PATIENCE_S = 600.0
_UNCALLED_S = 60.0
_LINGER_S = 15.0

SAID_DONE = "said to be done"
"""The message of an effect of which a person has said that it happened."""

Decision = Literal["done", "rerun"]


@dataclass(frozen=True)
class Standing:
    """How far the last attempt at an effect got."""

    attempt: int
    over: bool


def actor_name(run_id: str, step: str, call: Call) -> str:
    """Return the name of the actor of one attempt at an effect."""
    return f"{run_id}/{step}/{call.item}/{call.attempt}"


def standings(events: Iterable[Event]) -> dict[tuple[str, int], Standing]:
    """Return, from a run's events, how far the effects got that have begun: by step and item."""
    found: dict[tuple[str, int], Standing] = {}
    for event in events:
        if event.kind in (BEGUN, OVER) and event.step is not None:
            where = (event.step, int(event.data.get("item", -1)))
            found[where] = Standing(int(event.data["attempt"]), event.kind == OVER)
    return found


def standings_in(ledger: Ledger, run_id: str) -> dict[tuple[str, int], Standing]:
    """Return how far the effects of a run got."""
    begun = ledger.events(run_id=run_id, kind=BEGUN)
    over = ledger.events(run_id=run_id, kind=OVER) if begun else []
    return standings(sorted([*begun, *over], key=lambda event: event.id))


class Effect:
    """The actor's class: it performs one call once, whoever asks and how often.

    Nobody else ends it for sure: its driver may be dead. So it ends itself when it has not been called,
    or has been over, for a while, and gives back what it holds of the cluster.
    """

    def __init__(self) -> None:
        self._answer: bytes | None = None
        self._error: BaseException | None = None
        self._end = _end_after(_UNCALLED_S)

    def run(self, job: bytes, calls: bytes) -> bytes:
        """Perform the call and record that it is over; asked again, answer or raise the same."""
        self._end.cancel()
        try:
            if self._error is not None:
                raise self._error
            if self._answer is None:
                (call,) = pickle.loads(calls)
                self._answer = pickle.dumps([_perform(unpacked(job), call)])
            return self._answer
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._end = _end_after(_LINGER_S)


def _end_after(wait_s: float) -> threading.Timer:
    timer = threading.Timer(wait_s, os._exit, (0,))
    timer.daemon = True
    timer.start()
    return timer


def _perform(job: Job, call: Call) -> Outcome:
    ledger = ledger_of(job.home)
    ledger.apply([_event(job, call, BEGUN)], fence=job.fence)
    outcome = perform(replace(job, fence=None), call)
    status = "succeeded" if outcome.error is None else "failed"
    writes: list[Any] = [_event(job, call, OVER, status=status)]
    if outcome.error is None:
        values = {"status": "succeeded", **outcome.facts}
        change = StepChange(run_id=job.run_id, name=job.step, item=call.item, values=values)
        writes += [change, *outcome.links]
    _record(ledger, writes)
    return outcome


def _record(ledger: Ledger, writes: list[Any]) -> None:
    """Write what has happened, however long the ledger cannot: it cannot be made not to have."""
    until_s = time.monotonic() + _RECORD_PATIENCE_S
    while True:
        try:
            return ledger.apply(writes)
        except LedgerError:
            if time.monotonic() > until_s:
                raise
            time.sleep(1.0)


def _event(job: Job, call: Call, kind: str, **data: Any) -> NewEvent:
    return _event_of(job.project, job.run_id, job.step, call.item, call.attempt, kind, **data)


def _event_of(
    project: str, run_id: str, step: str, item: int, attempt: int, kind: str, **data: Any
) -> NewEvent:
    data = {"item": item, "attempt": attempt, **data}
    return NewEvent(project=project, kind=kind, data=data, run_id=run_id, step=step)


def uncertain(
    run_id: str,
    step: str,
    item: int = -1,
    *,
    what: str = "it is not known whether step {step} has happened: it was cut off and must not run "
    "twice",
    why: str = "the process in which it ran is gone and has not said that it was done",
) -> WorkflowError:
    """Return the error that says that only a person can say what is to become of an effect."""
    which = step if item < 0 else f"{step} --item {item}"
    return WorkflowError(
        what.format(step=step),
        where=f"run {run_id}",
        why=why,
        fix="look whether it happened, then say so: "
        f"`mlops-ray resolve {run_id} {which} --done --output JSON` with what it returned, or "
        "`--rerun` to let it run again; then run the same command again",
    )


def resolve(
    ledger: Ledger,
    artifacts: ArtifactStore,
    run: RunRecord,
    step: str,
    item: int,
    decision: Decision,
    *,
    output: Any = None,
    fence: Lease,
) -> None:
    """Settle an uncertain effect as a person says.

    Args:
        ledger: Where the run is.
        artifacts: Where its outputs are.
        run: The run.
        step: The effect.
        item: Its call, if it is mapped, or −1.
        decision: Whether it happened, or is to run again.
        output: What the step returned, for ``done``: a JSON value.
        fence: The lease of the run's instance, so that nothing runs it meanwhile.

    Raises:
        WorkflowError: That step of the run is not uncertain.
    """
    record = _uncertain_record(ledger, run, step, item)
    values: dict[str, Any] = {"status": "pending", "message": None, "error": None}
    if decision == "done":
        values |= {"status": "succeeded", "output": artifacts.put(output)}
        values["message"] = SAID_DONE
    where = {"project": run.project, "run_id": run.run_id, "step": step}
    over = _event_of(**where, item=item, attempt=record.attempt, kind=OVER, status=decision)
    said = NewEvent(kind="effect_resolved", data={"item": item, "as": decision}, **where)
    change = StepChange(run_id=run.run_id, name=step, item=item, values=values)
    ledger.apply([over, said, change], fence=fence)


def _uncertain_record(ledger: Ledger, run: RunRecord, step: str, item: int) -> StepRecord:
    records = ledger.steps(run.run_id) if item < 0 else ledger.items(run.run_id, step)
    for record in records:
        if record.name == step and record.item == item and record.status == "uncertain":
            return record
    raise WorkflowError(
        f"step {step!r} of run {run.run_id} is not uncertain",
        fix=f"see its steps with `mlops-ray status {run.run_id}`",
    )
