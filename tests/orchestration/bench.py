"""A bench for running small workflows on a real Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import RunRecord
from mlops_ray.orchestration.executor import Executor
from mlops_ray.orchestration.spec import RunSpec


class Bench:
    """A home, a folder where steps leave marks, and a project to put steps into."""

    def __init__(self, project: Any, home: Home, marks: Path) -> None:
        self.base = project
        self.home = home
        self.marks = marks

    def project(self, _more: dict[str, Any] | None = None, /, **steps: dict[str, Any]) -> Any:
        """Return a project with these steps; ``marks: True`` gives one the folder."""
        made = {}
        for name, step in steps.items():
            step = dict(step)
            inputs = {"marks": str(self.marks)} if step.pop("marks", False) else {}
            made[name] = Step.model_validate(step | {"with": inputs | step.get("with", {})})
        workflow = Workflow(name="bench", steps=made, **(_more or {}))
        update = {"workflow": workflow, "home": self.home.root, "allow": ("orchestration",)}
        return self.base.model_copy(update=update)

    def executor(self, project: Any, listener: Callable[..., Any] | None = None) -> Executor:
        return Executor(RunSpec.of(project, directory=self.marks), listener=listener)

    def run(self, project: Any) -> tuple[RunRecord, dict[str, str], Executor]:
        """Run and return the run, the steps' states, and the executor."""
        executor = self.executor(project)
        record = executor.run()
        return record, self.states(record.run_id), executor

    def result(self, step: str, /, **steps: dict[str, Any]) -> Any:
        """Run these steps and return the output of one."""
        record, _, executor = self.run(self.project(**steps))
        return executor.output(record.run_id, step)

    @property
    def ledger(self) -> Ledger:
        return open_ledger(self.home)

    def states(self, run_id: str) -> dict[str, str]:
        return {step.name: step.status for step in self.ledger.steps(run_id)}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the data of the newest run's events of a kind, with the step."""
        run = self.ledger.runs()[0]
        found = self.ledger.events(run_id=run.run_id, kind=kind)
        return [event.data | {"step": event.step} for event in found]

    def count(self, name: str) -> int:
        file = self.marks / name
        return len(file.read_text()) if file.exists() else 0
