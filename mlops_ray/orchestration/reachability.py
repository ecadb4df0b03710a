"""Steps that can never run, and steps whose outputs nobody uses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
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


def unused_outputs(graph: Graph, flat: Flat, silent: Collection[str]) -> Iterator[Found]:
    """Yield the pure steps whose output no step and no declared output takes, and which none waits
    for. That is an error where the workflow around them declares its outputs, else a warning.

    Those in ``silent`` return nothing that one could use.
    """
    used = {*silent}
    for name in graph.order:
        used |= graph.needs[name] | graph.after[name]
    for outputs in flat.outputs.values():
        used |= {reference.step for reference in references.find(outputs)}
    for name in graph.order:
        if name in used or graph.step(name).mode != "pure":
            continue
        if flat.outputs[name.rpartition("/")[0]]:
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
    numbers = [int(x) if isinstance(x, bool) else x for x in literals if isinstance(x, int | float)]
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
