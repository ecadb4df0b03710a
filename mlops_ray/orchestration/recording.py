"""The driver's account of a run: each change goes to the ledger, and is kept for who looks on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from mlops_ray.metadata.journal import Journal
from mlops_ray.metadata.records import (
    NewEvent,
    NewKey,
    RunRecord,
    RunStatus,
    StepChange,
    StepRecord,
    StepStatus,
    Write,
)
from mlops_ray.orchestration.keys import StepKey
from mlops_ray.orchestration.tracing import Trace

Listener = Callable[[RunRecord, list[StepRecord]], None]

_NOTIFY_EVERY_S = 0.25
_PROGRESS_EVERY_S = 0.5


class Recorder:
    """Records what happens in one run.

    Args:
        run: The run.
        steps: Its steps as they are when the driver begins, in the order of the plan.
        journal: Where the changes are written.
        needs: The steps whose outputs each step takes: what its span is linked to.
        trace: The run's spans; None where tracing is off.
        listener: Called at most four times a second with the run and its steps.
    """

    def __init__(
        self,
        run: RunRecord,
        steps: list[StepRecord],
        journal: Journal,
        *,
        needs: Mapping[str, frozenset[str]],
        trace: Trace | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.run = run
        self.steps = {step.name: step for step in steps}
        self._journal = journal
        self._needs = needs
        self._trace = trace
        self._listener = listener
        self._lost: set[str] = set()
        self._notified_s = 0.0
        self._shown_s = 0.0

    def set(
        self,
        name: str,
        status: StepStatus,
        *,
        item: int = -1,
        said: dict[str, Any] | None = None,
        **values: Any,
    ) -> None:
        """Set a step's status and other fields of its record; the event ``step_<status>`` says so.

        Args:
            name: The step.
            status: Its status from now on.
            item: The call of a mapped step.
            said: Data of the event, beside the item.
            values: Further fields of ``StepRecord``.
        """
        self._show_span(name, item, status, said or {}, values.get("error"))
        values["status"] = status
        self.write(
            StepChange(run_id=self.run.run_id, name=name, item=item, values=values),
            self._event(f"step_{status}", name, item, said or {}),
        )
        if item < 0:
            self._keep(name, values)

    def event(self, kind: str, step: str | None = None, item: int = -1, **data: Any) -> None:
        """Append an event."""
        self.write(self._event(kind, step, item, data))

    def key(self, key: StepKey) -> None:
        """Keep what a key was made of."""
        self.write(NewKey(key=key.key, parts=key.parts))

    def started(
        self, name: str, item: int, key: StepKey, message: str | None, **attempt: int
    ) -> None:
        """Say that a call runs."""
        self.set(
            name,
            "running",
            item=item,
            key=key.key,
            started_at=datetime.now(UTC),
            ended_at=None,
            error=None,
            message=message,
            said=attempt,
            **attempt,
        )

    def failed(self, name: str, item: int, error: str, said: dict[str, Any]) -> None:
        """Say that a call has failed for good, and with it its step."""
        ended: dict[str, Any] = {"ended_at": datetime.now(UTC), "error": error, "said": said}
        self.set(name, "failed", item=item, message=error, **ended)
        if item >= 0:
            self.set(name, "failed", message=f"call {item}: {error}", **ended)

    def cut_off(
        self, status: StepStatus, calls: Iterable[tuple[str, int]], left: Collection[str]
    ) -> None:
        """Say what becomes of the steps and calls that were cut off, but for those ``left`` running."""
        for name, step in self.steps.items():
            if step.status == "running" and name not in left:
                self.set(name, status, message="interrupted")
        for name, item in sorted(calls):
            if item >= 0:
                self.set(name, status, item=item, message="interrupted")

    def forget(self, name: str) -> None:
        """Take back how an earlier attempt at the run left a step: it waits again."""
        values = {"status": "pending", "message": None, "error": None, "ended_at": None}
        self.write(StepChange(run_id=self.run.run_id, name=name, values=values))
        self._keep(name, values)

    def retry(self, name: str, item: int, error: str, said: dict[str, Any]) -> None:
        """Say that a call failed and will be tried again."""
        if self._trace is not None:
            self._trace.noted(name, "retry", item, **said)
        values = {"error": error}
        self.write(
            StepChange(run_id=self.run.run_id, name=name, item=item, values=values),
            self._event("step_retried", name, item, said),
        )
        if item < 0:
            self._keep(name, values)

    def keep(self, record: StepRecord) -> None:
        """Take over a step's record as it is in the ledger."""
        if record.item < 0:
            self.steps[record.name] = record

    def message(self, name: str, message: str) -> None:
        """Say how far a step is; the ledger hears of it at most twice a second."""
        self._keep(name, {"message": message})
        if time.monotonic() - self._shown_s >= _PROGRESS_EVERY_S:
            self._shown_s = time.monotonic()
            values = {"message": message}
            self.write(StepChange(run_id=self.run.run_id, name=name, values=values))

    def show(self, name: str, rows: int | None, message: str | None) -> None:
        """Take over progress that the ledger has already."""
        if self.steps[name].status == "running":
            self._keep(name, {"rows": rows, "message": message})

    def write(self, *writes: Write) -> None:
        """Queue writes.

        Raises:
            LedgerError: An earlier write has failed.
        """
        self._journal.write(*writes)

    def flush(self) -> None:
        """Return when all that was recorded is durable.

        Raises:
            LedgerError: A write has failed.
        """
        self._journal.flush()

    def notify(self, *, force: bool = False) -> None:
        """Tell the listener how things stand, if it is time to."""
        if self._listener is None:
            return
        if force or time.monotonic() - self._notified_s >= _NOTIFY_EVERY_S:
            self._notified_s = time.monotonic()
            self._listener(self.run, list(self.steps.values()))

    def lost(self, step: str, item: int, digest: str, found_by: str) -> None:
        """Say once that an output is missing or corrupt."""
        if digest not in self._lost:
            self._lost.add(digest)
            self.event("artifact_corrupt", step, item, digest=digest, found_by=found_by)

    def keep_provenance(self, provenance: dict[str, Any]) -> None:
        """Keep what the run runs with; the ledger has it already."""
        self.run = self.run.model_copy(update={"provenance": provenance})

    def end(self, status: RunStatus) -> None:
        """Keep that the run is over, for the listener."""
        update = {"status": status, "ended_at": datetime.now(UTC)}
        self.run = self.run.model_copy(update=update)

    @property
    def is_traced(self) -> bool:
        """Whether the run has spans."""
        return self._trace is not None

    def traceparent(self, name: str, item: int) -> str:
        """Return the address of a call's span, "" where tracing is off."""
        return self._trace.traceparent(name, item) if self._trace is not None else ""

    def _show_span(
        self, name: str, item: int, status: StepStatus, said: dict[str, Any], error: str | None
    ) -> None:
        if self._trace is None:
            return
        if status == "running":
            self._trace.started(name, item, said.get("attempt", 1), self._needs.get(name, ()))
        else:
            self._trace.ended(name, status, item, error, **said)

    def _keep(self, name: str, values: dict[str, Any]) -> None:
        self.steps[name] = self.steps[name].model_copy(update=values)

    def _event(self, kind: str, step: str | None, item: int, data: dict[str, Any]) -> NewEvent:
        if item >= 0:
            data = {"item": item, **data}
        return NewEvent(
            project=self.run.project, kind=kind, data=data, run_id=self.run.run_id, step=step
        )
