"""A run as it was, and a run as it would be, seen alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from mlops_ray.config.workflow import Mode, Workflow
from mlops_ray.errors import ConfigError
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Link, RunRecord, StepRecord
from mlops_ray.orchestration import references
from mlops_ray.orchestration.graph import build
from mlops_ray.orchestration.plan import Plan


class Moment(Protocol):
    """A run, as it was or as it would be; ``run`` is its id, or ``now``."""

    run: str

    def names(self) -> list[str]:
        """Return the steps."""

    def status(self, step: str) -> str:
        """Return how it stands with a step, or what would become of it."""

    def key(self, step: str) -> str | None:
        """Return a step's key, if it is known."""

    def parts(self, step: str) -> dict[str, Any] | None:
        """Return what its key was made of, if that is known."""

    def said(self, step: str) -> str:
        """Return the reason that goes with its status, "" without one."""

    def mode(self, step: str) -> Mode:
        """Return its mode."""

    def wrote(self, step: str) -> list[Link]:
        """Return what it wrote by name."""

    def waits(self, step: str) -> dict[str, str]:
        """Return, for each input that is not known yet, the step that gives it."""

    def calls(self, step: str) -> tuple[int, int] | None:
        """Return how many of how many calls of a mapped step need not run; None of another."""


@dataclass
class Recorded:
    """A run of before."""

    ledger: Ledger
    record: RunRecord

    def __post_init__(self) -> None:
        self.run = self.record.run_id
        self._steps = {step.name: step for step in self.ledger.steps(self.run)}
        self._modes = _modes(self.record.config.get("workflow"))

    def names(self) -> list[str]:
        """Return the steps."""
        return list(self._steps)

    def status(self, step: str) -> str:
        """Return how it stands with a step."""
        return self._steps[step].status

    def key(self, step: str) -> str | None:
        """Return a step's key."""
        return self._steps[step].key

    def parts(self, step: str) -> dict[str, Any] | None:
        """Return what its key was made of."""
        key = self._steps[step].key
        return self.ledger.key_parts(key) if key is not None else None

    def said(self, step: str) -> str:
        """Return the reason that goes with its status."""
        record: StepRecord = self._steps[step]
        return (record.error if record.status == "failed" else record.message) or ""

    def mode(self, step: str) -> Mode:
        """Return its mode."""
        return self._modes.get(step, "pure")

    def wrote(self, step: str) -> list[Link]:
        """Return what it wrote by name."""
        links = self.ledger.links(run_id=self.run, direction="writes")
        return [link for link in links if link.step == step]

    def waits(self, step: str) -> dict[str, str]:
        """Return nothing: all that a run of before had was known."""
        return {}

    def calls(self, step: str) -> tuple[int, int] | None:
        """Return how many of how many calls came from the cache."""
        items = self.ledger.items(self.run, step)
        return (sum(item.status == "cached" for item in items), len(items)) if items else None

    def corrupt(self, step: str) -> bool:
        """Say whether an output of the step was found corrupt in this run."""
        events = self.ledger.events(run_id=self.run, kind="artifact_corrupt")
        return any(event.step == step for event in events)


class Planned:
    """What a run would do now."""

    run = "now"

    def __init__(self, plan: Plan) -> None:
        self._steps = {item.name: item for item in plan.steps}

    def names(self) -> list[str]:
        """Return the steps."""
        return list(self._steps)

    def status(self, step: str) -> str:
        """Return how it stands with a step."""
        return self._steps[step].state

    def key(self, step: str) -> str | None:
        """Return a step's key."""
        key = self._steps[step].key
        return key.key if key is not None else None

    def parts(self, step: str) -> dict[str, Any] | None:
        """Return what its key was made of."""
        key = self._steps[step].key
        return key.parts if key is not None else None

    def said(self, step: str) -> str:
        """Return the reason that goes with its status."""
        return self._steps[step].reason

    def mode(self, step: str) -> Mode:
        """Return its mode."""
        return self._steps[step].step.mode

    def wrote(self, step: str) -> list[Link]:
        """Return what it wrote by name."""
        return []

    def calls(self, step: str) -> tuple[int, int] | None:
        """Return how many of how many calls are cached."""
        return self._steps[step].calls

    def waits(self, step: str) -> dict[str, str]:
        """Return, for each input that is not known yet, the step that gives it."""
        declared = self._steps[step].step
        given = {**declared.inputs, **declared.map}
        return {
            name: reference.step
            for name, value in given.items()
            for reference in references.find(value)
            if self.status(step) == "depends" and self._steps[reference.step].output is None
        }


def _modes(workflow: Any) -> dict[str, Mode]:
    """Return the modes of a recorded workflow's steps; none where it has a form of long ago."""
    try:
        graph = build(Workflow.model_validate(workflow))
    except (ValidationError, ConfigError):
        return {}
    return {name: graph.step(name).mode for name in graph.order}
