"""From a step's declared inputs and the finished steps' outputs to its key and its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlops_ray.config.workflow import Step
from mlops_ray.errors import WorkflowError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.orchestration import references
from mlops_ray.orchestration.keys import code_digest, step_key
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
) -> str:
    """Return the key of a step whose inputs are all known.

    Outputs of the steps in ``ensured`` count by their name alone: an effect that has happened is not
    undone because an endpoint that it used was brought up again.
    """

    def digest(reference: Reference) -> Any:
        if reference.step in ensured:
            return {"$ensured": str(reference)}
        argument = resolve(reference, outputs, artifacts)
        if argument.ref is None:
            return {"$value": argument.value}
        return {"$digest": argument.ref.digest, "$kind": argument.ref.kind}

    inputs = references.replace(step.inputs, digest)
    return step_key(step.uses, code_digest(step.uses, step.inputs, packages), inputs)


def arguments_of(
    step: Step, outputs: Mapping[str, ArtifactRef], artifacts: ArtifactStore
) -> dict[str, Any]:
    """Return the step's inputs with each reference replaced by an ``Argument``."""

    def argument(reference: Reference) -> Argument:
        return resolve(reference, outputs, artifacts)

    return {name: references.replace(value, argument) for name, value in step.inputs.items()}


def resolve(
    reference: Reference, outputs: Mapping[str, ArtifactRef], artifacts: ArtifactStore
) -> Argument:
    """Find what a reference stands for.

    Raises:
        WorkflowError: The output is a table or files, or JSON without such a part.
    """
    ref = outputs[reference.step]
    if not reference.path:
        return Argument(ref)
    if ref.kind != "json":
        raise WorkflowError(
            f"{reference} selects a part of an output that is a {ref.kind}",
            fix=f"refer to the whole output: ${reference.step}",
        )
    output = artifacts.get(ref)
    try:
        return Argument(None, reference.select(output))
    except KeyError as error:
        known = ", ".join(output) if isinstance(output, dict) else type(output).__name__
        raise WorkflowError(
            f"{reference}: the output of {reference.step} has no part {error.args[0]!r}",
            fix=f"it has: {known}",
        ) from error
