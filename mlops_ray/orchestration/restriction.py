"""A part of a workflow: some steps, what they need, and others whose outputs are given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from mlops_ray.errors import WorkflowError
from mlops_ray.orchestration import references
from mlops_ray.orchestration.flattening import FlatStep
from mlops_ray.orchestration.graph import Graph


def restrict(graph: Graph, only: Collection[str], given: Collection[str] = ()) -> Graph:
    """Return the graph of the steps in ``only`` and of those whose outputs they need.

    A given step stays and needs nothing. Where ``only`` is empty all steps are wanted. Else no step
    of the part has conditions, as it is known to be wanted, and those that must merely be over before
    it count only where they are part of it.

    Raises:
        WorkflowError: There is no step of a name in ``only`` or ``given``.
    """
    if not only and not given:
        return graph
    unknown = sorted({*only, *given} - set(graph.order))
    if unknown:
        raise WorkflowError(
            f"there is no step {unknown[0]!r}", fix=f"steps are: {', '.join(graph.order)}"
        )
    kept = _needed(graph, only, given) if only else frozenset(graph.order)
    flat = {
        name: _part(graph.flat[name], kept, bool(only), name in given)
        for name in graph.order
        if name in kept
    }
    needs = {n: frozenset(r.step for r in item.references()) for n, item in flat.items()}
    after = {name: needs[name] | flat[name].after for name in flat}
    order = tuple(name for name in graph.order if name in kept)
    outputs = {
        name: value
        for name, value in graph.outputs.items()
        if all(reference.step in kept for reference in references.find(value))
    }
    return replace(graph, order=order, needs=needs, after=after, outputs=outputs, flat=flat)


def inputs_of(graph: Graph, name: str) -> frozenset[str]:
    """Return the steps whose outputs a step takes as arguments."""
    step = graph.step(name)
    return frozenset(r.step for value in (step.inputs, step.map) for r in references.find(value))


def _needed(graph: Graph, only: Collection[str], given: Collection[str]) -> frozenset[str]:
    kept: set[str] = set()
    waiting = list(only)
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += [] if name in given else inputs_of(graph, name)
    return frozenset(kept)


def _part(item: FlatStep, kept: frozenset[str], chosen: bool, given: bool) -> FlatStep:
    if not chosen and not given:
        return item
    after = frozenset() if given else item.after & kept
    changes: dict[str, Any] = {"when": None, "after": tuple(sorted(after))}
    if given:
        changes |= {"inputs": {}, "map": {}}
    return replace(item, step=item.step.model_copy(update=changes), conditions=(), after=after)
