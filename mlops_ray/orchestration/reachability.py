"""Steps that can never run, and steps whose outputs nobody uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Literal

from mlops_ray.errors import Problem, WorkflowError
from mlops_ray.orchestration import references
from mlops_ray.orchestration.conditions import Condition, Constant
from mlops_ray.orchestration.flattening import Flat
from mlops_ray.orchestration.graph import Graph

Found = tuple[Literal["problem", "warning"], Problem]


def never_runs(graph: Graph) -> Iterator[Found]:
    """Yield the steps that can never run: their conditions, and those of what they need, cannot hold
    together. Where only a given constant forbids it, that is a warning."""
    held: dict[str, dict[str, Condition]] = {}
    dead: set[str] = set()
    for name in graph.order:
        own = {str(condition): condition for condition in graph.conditions(name)}
        needed = [held[other] for other in sorted(graph.needs[name])]
        held[name] = own | {key: c for conditions in needed for key, c in conditions.items()}
        path = f"{graph.path(name)}.when" if own else graph.path(name)
        lost = sorted(graph.needs[name] & dead)
        refused = [reason for c in own.values() if (reason := c.constant_refusal()) is not None]
        if lost:
            what = f"never runs: it needs {', '.join(lost)}, which never runs."
            dead.add(name)
            yield "warning", Problem(path, what)
        elif refused:
            dead.add(name)
            yield "warning", Problem(path, f"never runs: {refused[0]}.")
        elif (pair := contradiction(held[name].values())) is not None:
            dead.add(name)
            yield "problem", Problem(path, f"can never run: it needs {' and '.join(pair)}.")


def unused_outputs(graph: Graph, flat: Flat) -> Iterator[Found]:
    """Yield the pure steps that lead to no effect and to no declared output. That is an error where
    the workflow around them declares its outputs, else a warning."""
    useful = _leading_to(graph, {n for n in graph.order if graph.step(n).mode != "pure"})
    for scope, outputs in flat.outputs.items():
        named = {reference.step for reference in references.find(outputs)}
        inside = _leading_to(graph, named) | useful
        for name in graph.order:
            around = name.rpartition("/")[0]
            if around != scope or name in inside or _is_asked_outside(graph, name, scope):
                continue
            if outputs:
                hint = "Use it, declare it under 'outputs', or take the step out."
                yield "problem", Problem(graph.path(name), "nothing uses its output.", hint=hint)
            else:
                hint = "To keep it as a result, declare it under 'outputs'."
                yield "warning", Problem(graph.path(name), "nothing uses its output.", hint=hint)


def contradiction(conditions: Iterable[Condition]) -> list[str] | None:
    """Return conditions on one operand that no value fulfils together, or None.

    Comparisons with literals only change their truth at the literals, so it is enough to try each
    literal, a value between each two neighbours, one below, one above, and one of each other type.
    """
    by_operand: dict[str, list[Condition]] = {}
    for condition in conditions:
        if not isinstance(condition.operand, Constant):
            by_operand.setdefault(str(condition.operand), []).append(condition)
    for group in by_operand.values():
        values = list(_candidates([condition.literal for condition in group]))
        if not any(all(_holds(c, value) for c in group) for value in values):
            return [str(condition) for condition in group]
    return None


def _candidates(literals: list[Any]) -> Iterator[Any]:
    numbers = [x for x in literals if isinstance(x, int | float) and not isinstance(x, bool)]
    ordered = sorted({0, *numbers})
    yield from (True, False, None, "", "\x00", "\U0010ffff", ordered[0] - 1, ordered[-1] + 1)
    yield from ordered
    yield from ((one + two) / 2 for one, two in pairwise(ordered))
    for text in (x for x in literals if isinstance(x, str)):
        yield from (text, f"{text}\x00")


def _holds(condition: Condition, value: Any) -> bool:
    try:
        return condition.refusal(value) is None
    except WorkflowError:
        return False


def _leading_to(graph: Graph, goals: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(goals)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph.needs.get(name, ())
    return found


def _is_asked_outside(graph: Graph, name: str, scope: str) -> bool:
    """Say whether a step outside the scope uses what leads from here, through declared outputs."""
    prefix = f"{scope}/" if scope else ""
    asked = {other for n in graph.order if not n.startswith(prefix) for other in graph.needs[n]}
    return bool(scope) and name in _leading_to(graph, asked)
