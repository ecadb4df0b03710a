"""Declarations of workflows: steps that name functions, inputs that name other steps' outputs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlops_ray.config.base import Duration, Frozen, Target

Mode = Literal["pure", "effect", "ensure"]


class Resources(Frozen):
    """What a step asks of the cluster."""

    num_cpus: float = Field(default=0, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    memory_bytes: int | None = Field(default=None, ge=0)


class Step(Frozen):
    """One step. ``with`` values that start with ``$`` name outputs: ``$fit`` or ``$gate.passed``.

    ``mode``: a *pure* step is cached by its key and never runs twice for the same code, config and
    inputs; an *effect* runs once in each run, and not again when that run is resumed; an *ensure*
    step makes a state so (an endpoint is up) and runs in every attempt.
    """

    uses: Target
    inputs: dict[str, Any] = Field(default_factory=dict, alias="with")
    after: tuple[str, ...] = ()
    when: str | None = Field(default=None, pattern=r"^\$[A-Za-z_][\w.]*$")
    mode: Mode = "pure"
    retries: int = Field(default=0, ge=0)
    timeout: Duration | None = None
    resources: Resources = Resources()


class Workflow(Frozen):
    """A named DAG of steps."""

    name: str
    description: str = ""
    steps: dict[str, Step]
