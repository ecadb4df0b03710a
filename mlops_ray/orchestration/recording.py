"""The driver's account of a run: each change goes to the ledger, and is kept for who looks on."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from mlops_ray.metadata.journal import Journal
from mlops_ray.metadata.records import (
    NewEvent,
    NewKey,
    RunRecord,
    StepChange,
    StepRecord,
    StepStatus,
    Write,
)
from mlops_ray.orchestration.keys import StepKey

Listener = Callable[[RunRecord, list[StepRecord]], None]

_NOTIFY_EVERY_S = 0.25
_PROGRESS_EVERY_S = 0.5


class Recorder:
    """Records what happens in one run.

    Args:
        run: The run.
        steps: Its steps as they are when the driver begins, in the order of the plan.
        journal: Where the changes are written.
        listener: Called at most four times a second with the run and its steps.
    """

    def __init__(
        self,
        run: RunRecord,
        steps: list[StepRecord],
        journal: Journal,
        listener: Listener | None,
    ) -> None:
        self.run = run
        self.steps = {step.name: step for step in steps}
        self._journal = journal
        self._listener = listener
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

    def end(self, status: str) -> None:
        """Keep that the run is over, for the listener."""
        update = {"status": status, "ended_at": datetime.now(UTC)}
        self.run = self.run.model_copy(update=update)

    def _keep(self, name: str, values: dict[str, Any]) -> None:
        self.steps[name] = self.steps[name].model_copy(update=values)

    def _event(self, kind: str, step: str | None, item: int, data: dict[str, Any]) -> NewEvent:
        if item >= 0:
            data = {"item": item, **data}
        return NewEvent(
            project=self.run.project, kind=kind, data=data, run_id=self.run.run_id, step=step
        )
