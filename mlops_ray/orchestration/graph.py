"""The graph of a workflow: which step needs which, in what order, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.errors import ConfigError, Problem
from mlops_ray.orchestration.conditions import Condition
from mlops_ray.orchestration.flattening import Flat, FlatStep, flatten


@dataclass(frozen=True)
class Graph:
    """A workflow's steps in an order in which they can run; nested ones are named ``outer/inner``.

    ``needs`` holds, for each step, the steps whose outputs it or its conditions take; ``after`` also
    those that must merely be over. ``outputs`` are the declared ones of the whole workflow.
    ``limits`` say how many tasks may run at once in a scope, see ``scopes``.
    """

    workflow: Workflow
    order: tuple[str, ...]
    needs: Mapping[str, frozenset[str]]
    after: Mapping[str, frozenset[str]]
    outputs: Mapping[str, Any]
    limits: Mapping[str, int]
    flat: Mapping[str, FlatStep]

    def step(self, name: str) -> Step:
        """Return the declaration of a step, with references to flattened names."""
        return self.flat[name].step

    def conditions(self, name: str) -> tuple[Condition, ...]:
        """Return all conditions that must hold for a step to run: those around it, then its own."""
        return self.flat[name].conditions

    def path(self, name: str) -> str:
        """Return the dotted path at which a step is declared."""
        return self.flat[name].path

    def scopes(self, name: str) -> tuple[str, ...]:
        """Return the workflows that a step is part of: ``""``, the whole, then the nested ones."""
        parts = name.split("/")
        return tuple("/".join(parts[:length]) for length in range(len(parts)))


def build(workflow: Workflow) -> Graph:
    """Build the graph.

    Raises:
        ConfigError: With every problem: references to steps that do not exist, cycles, no steps.
    """
    flat = flatten(workflow)
    if flat.problems:
        raise ConfigError(flat.problems)
    return graph_of(workflow, flat)


def graph_of(workflow: Workflow, flat: Flat) -> Graph:
    """Put the steps of a flat workflow in order.

    Raises:
        ConfigError: The steps form a cycle.
    """
    needs = {
        name: frozenset(reference.step for reference in item.references())
        for name, item in flat.steps.items()
    }
    after = {name: needs[name] | item.after for name, item in flat.steps.items()}
    order = _order(after, flat)
    return Graph(workflow, order, needs, after, flat.outputs[""], flat.limits, flat.steps)


def _order(after: Mapping[str, frozenset[str]], flat: Flat) -> tuple[str, ...]:
    position = {name: index for index, name in enumerate(after)}
    try:
        # In the order of the declaration where that is free: a set's own differs between processes.
        sorter = TopologicalSorter(
            {n: sorted(o, key=position.__getitem__) for n, o in after.items()}
        )
        return tuple(sorter.static_order())
    except CycleError as error:
        names = error.args[1]
        cycle = " → ".join(reversed(names))
        problem = Problem(flat.steps[names[0]].path, f"the steps form a cycle: {cycle}.")
        raise ConfigError([problem]) from error
