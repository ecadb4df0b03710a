"""What the driver knows of effects that must not happen twice: how far the ones that began have got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlops_ray.errors import WorkflowError
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import StepRecord
from mlops_ray.orchestration import once
from mlops_ray.orchestration.recording import Recorder
from mlops_ray.orchestration.work import Work
from mlops_ray.orchestration.worker import Call


class Effects:
    """Finds out what became of effects.

    Args:
        ledger: Where their actors say how far they got.
        recorder: Where it is recorded that nobody knows.
        standings: Those that had begun before this attempt at the run, by step and item.
    """

    def __init__(
        self,
        ledger: Ledger,
        recorder: Recorder,
        standings: Mapping[tuple[str, int], once.Standing],
    ) -> None:
        self._ledger = ledger
        self._recorder = recorder
        self._standings = dict(standings)
        self._run_id = recorder.run.run_id

    def before(self, name: str, item: int) -> once.Standing | None:
        """Return how far an effect got before this attempt at the run; asked again, None."""
        return self._standings.pop((name, item), None)

    def record_of(self, work: Work, call: Call) -> StepRecord | None:
        """Return the record of an effect whose actor is gone, if it was done; None if it had not begun
        or had failed.

        Raises:
            WorkflowError: It had begun and was not over: only a person can say.
        """
        standing = once.standings_in(self._ledger, self._run_id).get((work.name, call.item))
        if standing is None or standing.attempt != call.attempt:
            return None
        if not standing.over:
            raise self.uncertain(work.name, call.item, call.attempt)
        mapped = call.item >= 0
        known = (
            self._ledger.items(self._run_id, work.name)
            if mapped
            else self._ledger.steps(self._run_id)
        )
        found = (r for r in known if (r.name, r.item) == (work.name, call.item))
        return next((r for r in found if r.status == "succeeded" and r.output), None)

    def uncertain(self, name: str, item: int, attempt: int) -> WorkflowError:
        """Record that nobody knows whether an effect happened; return the error that says so."""
        error = once.uncertain(self._run_id, name, item)
        return self._ask(name, item, error, "nobody knows whether it happened", attempt=attempt)

    def lost(self, record: StepRecord) -> WorkflowError:
        """Record that the output of an effect that happened is lost; return the error that asks."""
        what = "step {step} has happened and must not run twice, but its output is lost"
        why = "its artifact is missing or corrupt, and only the step itself could make it again"
        error = once.uncertain(self._run_id, record.name, record.item, what=what, why=why)
        return self._ask(record.name, record.item, error, "it happened, but its output is lost")

    def remade(self, name: str, item: int, key: str) -> WorkflowError:
        """Record that an effect that happened has other inputs now, although nobody has changed
        anything; return the error that asks."""
        what = "step {step} has happened and must not run twice, but its inputs are others now"
        why = "a step before it ran once more and gave something else than before"
        error = once.uncertain(self._run_id, name, item, what=what, why=why)
        return self._ask(name, item, error, "it happened, but with other inputs", key=key)

    def unresolved(self, record: StepRecord) -> WorkflowError:
        """Return the error that asks once more about an effect on which nobody has decided yet."""
        if record.error is None:
            return once.uncertain(self._run_id, record.name, record.item)
        return once.uncertain(
            self._run_id, record.name, record.item, what=record.error, why=record.message or ""
        )

    def _ask(
        self, name: str, item: int, error: WorkflowError, message: str, **values: Any
    ) -> WorkflowError:
        said = {"reason": message} | {k: v for k, v in values.items() if k == "attempt"}
        self._recorder.set(
            name, "uncertain", item=item, error=error.what, message=message, said=said, **values
        )
        return error
