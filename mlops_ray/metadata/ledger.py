"""The ledger: runs, their steps, what they read and wrote, and an append-only list of events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlops_ray.metadata.database import PATIENCE_S, Backend, Database
from mlops_ray.metadata.operations import Fence
from mlops_ray.metadata.records import (
    Event,
    Firing,
    Lease,
    Link,
    NewEvent,
    RunRecord,
    RunStatus,
    StepRecord,
    Write,
)
from mlops_ray.metadata.rows import batches, cell, decode, encode

_NAMES_PER_QUERY = 2000


class Ledger:
    """The ledger of a home; ``open_ledger`` is the way to get one.

    Every method that writes is one transaction: it happens whole or not at all, and on return it is
    durable. Each method raises ``LedgerError`` where the database cannot be reached or refuses.
    Threads may share a ledger.

    Args:
        at: SQLAlchemy URL of SQLite or PostgreSQL, or what stands in for a database.
        patience_s: How long to wait for a lock, or for a server that is away.
    """

    def __init__(self, at: str | Backend, *, patience_s: float = PATIENCE_S) -> None:
        self._backend = Database(at, patience_s=patience_s) if isinstance(at, str) else at

    # Writing

    def start_run(self, record: RunRecord, steps: Sequence[str]) -> None:
        """Record a new run whose steps are all pending."""
        self._backend.write("start_run", encode(record), list(steps))

    def resume_run(
        self, run_id: str, owner: str, provenance: dict[str, Any], *, fence: Lease | None = None
    ) -> None:
        """Make a run that is over, or whose owner is gone, ``owner``'s: running again.

        Raises:
            LeaseError: The fence is no longer ours.
        """
        self._backend.write("resume_run", run_id, owner, cell(provenance), _fence(fence))

    def finish_run(self, run_id: str, status: RunStatus, *, fence: Lease | None = None) -> None:
        """Set a run's status and its end.

        Raises:
            LeaseError: The fence is no longer ours.
        """
        self._backend.write("finish_run", run_id, status, _fence(fence))

    def apply(self, writes: Iterable[Write], *, fence: Lease | None = None) -> None:
        """Write a batch in one transaction, in order.

        Raises:
            LeaseError: The fence is no longer ours: nothing was written.
            ValueError: A change names something that a step has not.
        """
        self._backend.write("apply", batches(writes), _fence(fence))

    def append(
        self,
        project: str,
        kind: str,
        data: dict[str, Any],
        *,
        run_id: str | None = None,
        step: str | None = None,
    ) -> None:
        """Append an event. Events are never changed or removed."""
        self.apply([NewEvent(project=project, kind=kind, data=data, run_id=run_id, step=step)])

    # Leases

    def acquire(self, name: str, owner: str, ttl_s: float, *, dead: Lease | None = None) -> Lease:
        """Take the lease of that name, if it is free, has expired, is ``owner``'s own, or is still
        ``dead``, one whose owner is known to be dead: who was faster and took that over keeps it.
        The token is greater than every earlier one.

        Raises:
            LeaseError: Another owner holds it; ``lease`` in the error says who, until when.
        """
        return Lease(**self._backend.write("acquire", name, owner, ttl_s, dead and dead.token))

    def renew(self, lease: Lease, ttl_s: float) -> Lease:
        """Hold a lease for another ``ttl_s`` seconds from now.

        Raises:
            LeaseError: Another owner has taken it.
        """
        expires = self._backend.write("renew", _fence(lease), ttl_s)
        return Lease(name=lease.name, owner=lease.owner, token=lease.token, expires_at=expires)

    def release(self, lease: Lease) -> None:
        """Give a lease back, if it is still ours. Its token is remembered."""
        self._backend.write("release", _fence(lease))

    def lease(self, name: str) -> Lease | None:
        """Return a lease as it is, expired or not; None where nobody ever took it."""
        rows = self._backend.read("lease", name)
        return Lease(**rows[0]) if rows else None

    # Firings

    def fire(
        self, firing: Firing, *, event: NewEvent | None = None, fence: Lease | None = None
    ) -> bool:
        """Record that a trigger has fired, together with an event; False, and no event, where this
        occasion has been recorded already.

        Raises:
            LeaseError: The fence is no longer ours: nothing was written.
        """
        events = [encode(event)] if event else []
        return bool(self._backend.write("fire", encode(firing), events, _fence(fence)))

    def update_firing(
        self,
        key: str,
        *,
        event: NewEvent | None = None,
        fence: Lease | None = None,
        **values: Any,
    ) -> None:
        """Change fields of a firing, together with an event.

        Raises:
            LeaseError: The fence is no longer ours: nothing was written.
        """
        encoded = {name: cell(value) for name, value in values.items()}
        events = [encode(event)] if event else []
        self._backend.write("update_firing", key, encoded, events, _fence(fence))

    def firings(
        self,
        *,
        project: str | None = None,
        trigger: str | None = None,
        status: str | None = None,
        key: str | None = None,
        not_like: str | None = None,
        begun: bool = False,
        limit: int = 100,
    ) -> list[Firing]:
        """Return firings, newest first.

        Args:
            project: Only those of a project.
            trigger: Only those of a trigger.
            status: Only those that stand so.
            key: Only this one.
            not_like: None whose key begins so.
            begun: Only those that have, or had, a job.
            limit: How many at most.
        """
        given = {"project": project, "trigger": trigger, "status": status, "key": key}
        asked = (given, not_like, begun, limit)
        return [Firing(**decode(row)) for row in self._backend.read("firings", *asked)]

    # Reading

    def run(self, run_id: str) -> RunRecord | None:
        """Return a run, or None."""
        rows = self._backend.read("run", run_id)
        return RunRecord(**decode(rows[0])) if rows else None

    def runs(
        self,
        *,
        project: str | None = None,
        workflow: str | None = None,
        config_digest: str | None = None,
        limit: int | None = 20,
    ) -> list[RunRecord]:
        """Return runs, newest first; all of them where ``limit`` is None."""
        given = {"project": project, "workflow": workflow, "config_digest": config_digest}
        return [RunRecord(**decode(row)) for row in self._backend.read("runs", given, limit)]

    def unmirrored(self) -> list[RunRecord]:
        """Return the runs that are over and have no ``mirrored`` event that tells the same end."""
        return [RunRecord(**decode(row)) for row in self._backend.read("unmirrored")]

    def steps(self, run_id: str) -> list[StepRecord]:
        """Return a run's steps in the order of the plan, without the calls of mapped ones."""
        return self._steps("steps", run_id)

    def steps_of(self, run_ids: Iterable[str]) -> list[StepRecord]:
        """Return the steps of many runs, by run, each as ``steps`` does."""
        parts = (self._steps("steps_of", part) for part in _portions(run_ids))
        return [step for part in parts for step in part]

    def calls_of(self, run_ids: Iterable[str]) -> list[StepRecord]:
        """Return the calls of mapped steps, of many runs, that gave something, in no order."""
        parts = (self._steps("calls_of", part) for part in _portions(run_ids))
        return [step for part in parts for step in part]

    def items(self, run_id: str, step: str) -> list[StepRecord]:
        """Return the calls of a mapped step, in the order of its list."""
        return self._steps("items", run_id, step)

    def cached(self, keys: Iterable[str]) -> dict[str, StepRecord]:
        """Return, for each of the keys that has one, the newest finished step with it."""
        parts = (self._steps("cached", part) for part in _portions(keys))
        return {str(step.key): step for part in parts for step in part}

    def latest(self, project: str, step: str) -> StepRecord | None:
        """Return the newest finished step of this name in any run of a project, or None."""
        found = self._steps("latest", project, step)
        return found[0] if found else None

    def key_parts(self, key: str) -> dict[str, Any] | None:
        """Return what a cache key was made of, or None."""
        return self.parts_of([key]).get(key)

    def parts_of(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return what cache keys were made of, for each of the keys that is known."""
        rows = (self._backend.read("parts_of", part) for part in _portions(keys))
        return {row["key"]: json.loads(row["parts"]) for part in rows for row in part}

    def links(
        self,
        *,
        run_id: str | None = None,
        kind: str | None = None,
        name: str | None = None,
        direction: str | None = None,
    ) -> list[Link]:
        """Return what steps have read and written by name."""
        given = {"run_id": run_id, "kind": kind, "name": name, "direction": direction}
        return [Link(**row) for row in self._backend.read("links", given)]

    def events(
        self,
        *,
        project: str | None = None,
        run_id: str | None = None,
        kind: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[Event]:
        """Return events with an id greater than ``after``, in the order of their ids.

        Ids grow in the order of the commits: one who reads on from the last id that was seen misses
        nothing. They may have gaps.
        """
        given = {"project": project, "run_id": run_id, "kind": kind}
        return [Event(**decode(row)) for row in self._backend.read("events", given, after, limit)]

    def close(self) -> None:
        """Close all connections."""
        self._backend.close()

    def _steps(self, query: str, *arguments: Any) -> list[StepRecord]:
        return [StepRecord(**decode(row)) for row in self._backend.read(query, *arguments)]


def _portions(names: Iterable[str]) -> Iterator[list[str]]:
    wanted = list(dict.fromkeys(names))
    for start in range(0, len(wanted), _NAMES_PER_QUERY):
        yield wanted[start : start + _NAMES_PER_QUERY]


def _fence(lease: Lease | None) -> Fence | None:
    return None if lease is None else (lease.name, lease.token)
