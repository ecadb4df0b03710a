"""What the loop's steps hand on."""

from __future__ import annotations

from mlops_ray.config.base import Frozen, Instant


class MonitorHandle(Frozen):
    """A running controller: the name of its actor, in Ray namespace ``namespace``."""

    project: str
    actor: str
    namespace: str


class ReplayResult(Frozen):
    """A finished replay. Its parts and ``history.json`` lie in ``folder``.

    ``requests`` are those of the replayed rows, ``background_requests`` those that were sent beside
    while it waited for a retraining; ``failed_requests`` counts both kinds. ``unlogged_rows`` were
    answered but never reported by the replicas.
    """

    folder: str
    start: Instant
    end: Instant
    rows: int
    requests: int
    background_requests: int
    failed_requests: int
    unlogged_rows: int
    p50_ms: float | None
    p99_ms: float | None
    wall_s: float
    versions: dict[str, int]
