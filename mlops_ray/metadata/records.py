"""What the ledger holds: runs, steps, events, keys, links, leases, firings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.metadata.artifacts import ArtifactRef

RunStatus = Literal["running", "succeeded", "failed", "interrupted", "cancelled"]
StepStatus = Literal[
    "pending", "running", "succeeded", "cached", "skipped", "failed", "cancelled", "uncertain"
]
FiringStatus = Literal["due", "submitted", "succeeded", "failed", "cancelled", "skipped"]
LinkKind = Literal["source", "view", "model", "deployment", "artifact"]

MIRRORED = "mirrored"
"""The kind of event that says that a run is in MLflow."""


class RunRecord(Frozen):
    """One run of a workflow. ``reason`` says who or what asked for it."""

    run_id: str
    project: str
    workflow: str
    status: RunStatus
    config_digest: str
    started_at: Instant
    ended_at: Instant | None
    owner: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    reason: str = "by hand"


class StepRecord(Frozen):
    """One step of a run: its state, its cache key, and the address of its output.

    A mapped step has one record for itself (``item`` −1) and one for each call (0, 1, …).
    ``attempt`` counts tries in this run from 1; 0: none yet. ``error`` is the headline of the last
    failure; ``node`` says where it ran last (``host:pid``).
    """

    run_id: str
    name: str
    item: int = -1
    position: int
    status: StepStatus
    key: str | None = None
    output: ArtifactRef | None = None
    started_at: Instant | None = None
    ended_at: Instant | None = None
    attempt: int = 0
    rows: int | None = None
    message: str | None = None
    error: str | None = None
    node: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    params: dict[str, Any] = Field(default_factory=dict)


class Event(Frozen):
    """One fact: when, about what, and its data."""

    id: int
    at: Instant
    project: str
    run_id: str | None
    step: str | None
    kind: str
    data: dict[str, Any]


class Link(Frozen):
    """A step has read or written something that outlives the run, by name.

    Names: ``source``: the source's; ``view``: ``weather@14`` (version of its offline table);
    ``model``: ``flights@7``; ``deployment``: the endpoint's; ``artifact``: a digest.
    """

    run_id: str
    step: str
    direction: Literal["reads", "writes"]
    kind: LinkKind
    name: str


class Lease(Frozen):
    """Who may write under a name until when. ``token`` grows with each owner: the fence."""

    name: str
    owner: str
    token: int
    expires_at: Instant


class Firing(Frozen):
    """One occasion on which a trigger fired. ``key`` says which: the same occasion fires once."""

    key: str
    project: str
    trigger: str
    at: Instant
    status: FiringStatus
    attempt: int = 0
    job: str | None = None
    reason: str = ""
    data: dict[str, Any] = Field(default_factory=dict)


class StepChange(Frozen):
    """Set columns of a step's record; one that is not there is made.

    ``values`` are fields of ``StepRecord``; what is not named stays.
    """

    run_id: str
    name: str
    item: int = -1
    values: dict[str, Any]


class NewEvent(Frozen):
    """Append an event."""

    project: str
    kind: str
    data: dict[str, Any] = Field(default_factory=dict)
    run_id: str | None = None
    step: str | None = None


class NewKey(Frozen):
    """Keep what a cache key was made of; nothing happens where the key is known."""

    key: str
    parts: dict[str, Any]


Write = StepChange | NewEvent | NewKey | Link
"""What a batch of writes is made of."""
