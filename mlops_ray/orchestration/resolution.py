"""From a step's declared inputs and the finished steps' outputs to its key and its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlops_ray.config.workflow import Step
from mlops_ray.errors import WorkflowError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.orchestration import references
from mlops_ray.orchestration.conditions import Condition, Constant
from mlops_ray.orchestration.keys import Given, StepKey, step_key
from mlops_ray.orchestration.references import Reference


@dataclass(frozen=True)
class Argument:
    """An input that is another step's output: its address, or the selected part of it."""

    ref: ArtifactRef | None
    value: Any = None


def key_of(
    step: Step,
    outputs: Mapping[str, ArtifactRef],
    artifacts: ArtifactStore,
    packages: Iterable[str],
    *,
    ensured: frozenset[str] = frozenset(),
) -> StepKey:
    """Return the key of a step whose inputs are all known.

    Outputs of the steps in ``ensured`` count by their name alone: an effect that has happened is not
    undone because an endpoint that it used was brought up again.
    """

    def given(reference: Reference) -> Given:
        source = {"step": reference.step} | (
            {"part": list(reference.path)} if reference.path else {}
        )
        if reference.step in ensured:
            return Given({"$ensured": str(reference)}, source | {"ensured": True})
        argument = resolve(reference, outputs, artifacts)
        if argument.ref is None:
            return Given({"$value": argument.value}, source | {"value": argument.value})
        digest = argument.ref.digest
        return Given({"$digest": digest, "$kind": argument.ref.kind}, source | {"digest": digest})

    return step_key(step, given, tuple(packages))


def arguments_of(
    step: Step, outputs: Mapping[str, ArtifactRef], artifacts: ArtifactStore
) -> dict[str, Any]:
    """Return the step's inputs with each reference replaced by an ``Argument``.

    What the step maps over is not among them, see ``elements_of``.
    """

    def argument(reference: Reference) -> Argument:
        return resolve(reference, outputs, artifacts)

    return {name: references.replace(value, argument) for name, value in step.inputs.items()}


def elements_of(
    step: Step, outputs: Mapping[str, ArtifactRef], artifacts: ArtifactStore
) -> list[dict[str, Argument]]:
    """Return, for each call of a mapped step, the arguments that it maps over.

    Raises:
        WorkflowError: What it maps over is no list, or the lists are of different lengths.
    """
    lists = {
        name: list(_elements(references.parse(text), outputs, artifacts))
        for name, text in step.map.items()
    }
    lengths = {len(elements) for elements in lists.values()}
    if len(lengths) > 1:
        shown = ", ".join(f"{step.map[name]} has {len(items)}" for name, items in lists.items())
        raise WorkflowError("what a step maps over together must be of one length", where=shown)
    return [dict(zip(lists, call, strict=True)) for call in zip(*lists.values(), strict=True)]


def element_digest(argument: Argument) -> Any:
    """Return what an argument counts as in a key, see ``keys.item_key``."""
    if argument.ref is None:
        return {"$value": argument.value}
    return {"$digest": argument.ref.digest, "$kind": argument.ref.kind}


def refusal(
    conditions: Iterable[Condition],
    outputs: Mapping[str, ArtifactRef],
    artifacts: ArtifactStore,
) -> str | None:
    """Say in words why one of the conditions does not hold; None where all hold.

    Raises:
        WorkflowError: A condition asks for what its output does not have.
    """
    for condition in conditions:
        if isinstance(condition.operand, Constant):
            reason = condition.constant_refusal()
        else:
            reason = condition.refusal(_plain(condition.operand, outputs, artifacts))
        if reason is not None:
            return reason
    return None


def resolve(
    reference: Reference, outputs: Mapping[str, ArtifactRef], artifacts: ArtifactStore
) -> Argument:
    """Find what a reference stands for.

    Raises:
        WorkflowError: The output is a table or files, or JSON without such a part.
    """
    ref, path = outputs[reference.step], reference.path
    if path and ref.kind == "list":
        ref, path = _element(reference, artifacts.elements(ref), path[0]), path[1:]
    if not path:
        return Argument(ref)
    if ref.kind != "json":
        raise WorkflowError(
            f"{reference} selects a part of an output that is a {ref.kind}",
            fix=f"refer to the whole output: ${reference.step}",
        )
    output = artifacts.get(ref)
    try:
        return Argument(None, references.select(output, path))
    except KeyError as error:
        known = ", ".join(output) if isinstance(output, dict) else type(output).__name__
        raise WorkflowError(
            f"{reference}: the output of {reference.step} has no part {error.args[0]!r}",
            fix=f"it has: {known}",
        ) from error


def _element(reference: Reference, elements: list[ArtifactRef], part: str) -> ArtifactRef:
    if not (part.isdecimal() and int(part) < len(elements)):
        raise WorkflowError(
            f"{reference}: the output of {reference.step} has no part {part!r}",
            fix=f"it is a list of {len(elements)}",
        )
    return elements[int(part)]


def _elements(
    reference: Reference | None,
    outputs: Mapping[str, ArtifactRef],
    artifacts: ArtifactStore,
) -> Iterator[Argument]:
    assert reference is not None, "a flat workflow maps over references only"
    argument = resolve(reference, outputs, artifacts)
    if argument.ref is not None and argument.ref.kind == "list":
        yield from (Argument(element) for element in artifacts.elements(argument.ref))
        return
    value = argument.value if argument.ref is None else None
    if argument.ref is not None and argument.ref.kind == "json":
        value = artifacts.get(argument.ref)
    if not isinstance(value, list):
        kind = argument.ref.kind if argument.ref is not None else type(value).__name__
        raise WorkflowError(
            f"{reference} is not a list and cannot be mapped over",
            why=f"it is a {kind if value is None else type(value).__name__}",
            fix="return a list from that step",
        )
    yield from (Argument(None, item) for item in value)


def _plain(
    reference: Reference, outputs: Mapping[str, ArtifactRef], artifacts: ArtifactStore
) -> Any:
    argument = resolve(reference, outputs, artifacts)
    if argument.ref is None:
        return argument.value
    if argument.ref.kind != "json":
        raise WorkflowError(
            f"{reference} is a {argument.ref.kind}: a condition asks for JSON values",
            fix="let the step return what decides, as a field",
        )
    return artifacts.get(argument.ref)
