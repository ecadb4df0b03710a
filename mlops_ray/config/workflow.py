"""Declarations of workflows: steps that name functions, inputs that name other steps' outputs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mlops_ray.config.base import Duration, Frozen, Target

Mode = Literal["pure", "effect", "ensure"]

_NAME = r"^[A-Za-z_]\w*$"


class Resources(Frozen):
    """What a step asks of the cluster.

    ``custom`` are amounts of Ray's custom resources; ``labels`` choose nodes by their labels, in
    Ray's syntax (``{"ray.io/accelerator-type": "in(H100, H200)"}``).
    """

    num_cpus: float = Field(default=0, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    memory_bytes: int | None = Field(default=None, ge=0)
    custom: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


class Backoff(Frozen):
    """How long to wait before try n (from 1): ``first · factor^(n−1)``, at most ``most``.

    Of that, up to the share ``jitter`` is taken off at random, so that what failed together does
    not come back together.
    """

    first: Duration = timedelta(seconds=1)
    factor: float = Field(default=2.0, ge=1)
    most: Duration = timedelta(minutes=1)
    jitter: float = Field(default=0.5, ge=0, le=1)


class Retries(Frozen):
    """How often a step is tried again, by what went wrong. Each cause has its own budget.

    ``user``: the step raised. ``infrastructure``: its process died, memory ran out, its environment
    could not be made, an artifact could not be written or read. ``preemption``: its node was lost.
    A plain number means ``user``.
    """

    user: int = Field(default=0, ge=0)
    infrastructure: int = Field(default=3, ge=0)
    preemption: int = Field(default=10, ge=0)
    backoff: Backoff = Backoff()


class Environment(Frozen):
    """The environment of a step beyond that of the project.

    ``runtime`` is a Ray runtime environment of the step's own: ``pip``, ``uv``, ``image_uri``,
    ``env_vars``. Installed versions of ``packages`` and values of the environment ``variables``
    count for the step's cache key, as does ``runtime``.
    """

    packages: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    runtime: dict[str, Any] = Field(default_factory=dict)


class Step(Frozen):
    """One step: a function, or a nested workflow.

    ``with`` values that start with ``$`` name outputs: ``$fit``, ``$gate.passed``; inside a nested
    workflow ``$inputs.name`` is what it was given.

    ``map`` gives parameters one element at a time: ``{part: $parts}`` calls the function once for
    each element of the list that step ``parts`` returned (several parameters: lists of one length,
    taken together), also for elements that are equal. The step's output is the list of what the
    calls returned, in that order; at most ``max_parallel`` of them run at once.

    ``when`` is ``[not] $reference [operator literal]``, such as ``$gate.passed``, ``not $quiet`` or
    ``$report.auc >= 0.7``: where it does not hold the step is skipped, with all that need it.

    ``mode``: a *pure* step is cached by its key and never runs twice for the same code, config and
    inputs; an *effect* runs once in each run, and not again when that run is resumed; an *ensure*
    step makes a state so (an endpoint is up) and runs in every attempt. An effect that was cut off
    is run again on resume if it is ``idempotent``; if not, it outlives its driver, and where it was
    killed itself the run stops and asks a person.

    Steps of one ``group`` run one after the other in one process of their own, so that what one has
    loaded the next one finds. Of the steps that could run, those of higher ``priority`` go first.
    ``pickle`` lets the step return what only pickle can store.
    """

    uses: Target | None = None
    workflow: Workflow | None = None
    inputs: dict[str, Any] = Field(default_factory=dict, alias="with")
    map: dict[str, str] = Field(default_factory=dict)
    max_parallel: int | None = Field(default=None, ge=1)
    after: tuple[str, ...] = ()
    when: str | None = None
    mode: Mode = "pure"
    idempotent: bool = True
    retries: Retries = Retries()
    timeout: Duration | None = Field(default=None, gt=timedelta(0))
    resources: Resources = Resources()
    environment: Environment = Environment()
    group: str | None = Field(default=None, pattern=_NAME)
    priority: int = 0
    pickle: bool = False

    @field_validator("retries", mode="before")
    @classmethod
    def _plain_number(cls, value: Any) -> Any:
        plain = isinstance(value, int) and not isinstance(value, bool)
        return {"user": value} if plain else value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.uses is None) == (self.workflow is None):
            raise ValueError("a step has either 'uses', a function, or 'workflow', nested steps")
        if self.workflow is not None and (self.map or self.group):
            raise ValueError("'map' and 'group' are for functions, not for nested workflows")
        return self


class Workflow(Frozen):
    """A named DAG of steps.

    ``inputs`` are the names that a nested workflow is given, with defaults (``null``: required);
    ``outputs`` name what it gives: ``{model: $fit}``. A workflow that is nowhere nested needs
    neither. At most ``max_parallel`` tasks run at once.
    """

    name: str
    description: str = ""
    inputs: dict[str, Any] = Field(default_factory=dict)
    outputs: dict[str, str] = Field(default_factory=dict)
    steps: dict[str, Step]
    max_parallel: int | None = Field(default=None, ge=1)


Step.model_rebuild()
