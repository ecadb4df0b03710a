"""The graph of a workflow: which step needs which, in what order, and what is wrong with it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.errors import ConfigError, Problem
from mlops_ray.orchestration import references


@dataclass(frozen=True)
class Graph:
    """A workflow's steps in an order in which they can run.

    ``needs`` holds, for each step, the steps whose outputs it takes; ``after`` also those that must
    merely be over.
    """

    workflow: Workflow
    order: tuple[str, ...]
    needs: dict[str, frozenset[str]]
    after: dict[str, frozenset[str]]

    def step(self, name: str) -> Step:
        """Return the declaration of a step."""
        return self.workflow.steps[name]


def build(workflow: Workflow) -> Graph:
    """Build the graph.

    Raises:
        ConfigError: With every problem: references to steps that do not exist, cycles, no steps.
    """
    needs = {name: _needs(step) for name, step in workflow.steps.items()}
    after = {name: needs[name] | set(step.after) for name, step in workflow.steps.items()}
    problems = [
        _unknown(name, other, workflow)
        for name, others in after.items()
        for other in sorted(others - set(workflow.steps))
    ]
    if not workflow.steps:
        problems.append(Problem("workflow.steps", f"workflow {workflow.name!r} has no steps."))
    if problems:
        raise ConfigError(problems)
    return Graph(workflow, _order(after), needs, after)


def _needs(step: Step) -> frozenset[str]:
    found = {reference.step for reference in references.find(step.inputs)}
    condition = references.parse(step.when)
    return frozenset(found | ({condition.step} if condition else set()))


def _order(after: dict[str, frozenset[str]]) -> tuple[str, ...]:
    try:
        return tuple(TopologicalSorter(after).static_order())
    except CycleError as error:
        cycle = " → ".join(reversed(error.args[1]))
        raise ConfigError(
            [Problem(f"workflow.steps.{error.args[1][0]}", f"the steps form a cycle: {cycle}.")]
        ) from error


def _unknown(name: str, other: str, workflow: Workflow) -> Problem:
    close = difflib.get_close_matches(other, list(workflow.steps), n=1)
    hint = f"Did you mean ${close[0]}?" if close else f"Steps are: {', '.join(workflow.steps)}."
    return Problem(f"workflow.steps.{name}", f"there is no step {other!r}.", hint=hint)
