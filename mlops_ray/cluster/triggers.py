"""Triggers at work: what happened becomes firings, firings become jobs, jobs are seen through.

No Ray in here: the actor around it is in ``mlops_ray.cluster.trigger_actor``. Nothing is remembered
but in the ledger: a dispatcher that dies is followed by another that goes on.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from mlops_ray.cluster.cursors import Cursor, is_paused, open_cursor
from mlops_ray.cluster.lookout import Lookout
from mlops_ray.cluster.observations import World
from mlops_ray.config.base import Frozen
from mlops_ray.config.project import Project
from mlops_ray.config.triggers import Trigger
from mlops_ray.errors import (
    ClusterError,
    JobRefusedError,
    LeaseError,
    LedgerError,
    MlopsRayError,
)
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Firing, Lease, NewEvent
from mlops_ray.orchestration.jobs import JobCommand, JobOutcome, Jobs
from mlops_ray.orchestration.triggers import (
    FIRING_VARIABLE,
    REASON_VARIABLE,
    Action,
    Failure,
    Occasion,
    after_failure,
    arguments,
    event_of,
    firing_of,
    hand_prefix,
    has_begun,
    plan,
    reason_of,
    submission_id,
)

LEASE = "triggers/{project}"
LEASE_TTL_S = 20.0

_RENEW_EVERY_S = 4.0
_LOOK_EVERY_S = 3.0
_MOST_AT_ONCE = 10_000


class TriggersSpec(Frozen):
    """What a dispatcher is told: the project, its working directory, how a workflow of it is run."""

    project: Project
    directory: str
    command: JobCommand


class Dispatcher:
    """Looks at what triggers wait for, and sees their jobs through.

    Its methods may be called from any thread.

    Args:
        spec: What to do.
        ledger: Where everything is remembered.
        jobs: Where jobs run.
        world: What is looked at beside the ledger.
        owner: Who we are: of several dispatchers of a project one acts, the others stand by.
        clock: Tells the present moment.
    """

    def __init__(
        self,
        spec: TriggersSpec,
        ledger: Ledger,
        jobs: Jobs,
        world: World,
        *,
        owner: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._spec = spec
        self._name = spec.project.name
        self._triggers = spec.project.triggers
        self._ledger = ledger
        self._jobs = jobs
        self._world = world
        self._lookout = Lookout(spec.project, ledger, world, clock)
        self._owner = owner
        self._clock = clock
        self._turn = threading.RLock()
        self._lease: Lease | None = None
        self._renewed_s = self._looked_s = float("-inf")
        self._cursors: dict[str, Cursor] = {}
        self._troubles: dict[str, str] = {}

    def tick(self) -> bool:
        """Do all that is due; return whether it is this dispatcher that acts.

        Raises:
            LedgerError: The ledger cannot be reached.
        """
        with self._turn:
            try:
                if not self._hold():
                    return False
                self._look()
                self._follow()
                self._act()
            except LeaseError:
                self._lease = None
                return False
            return True

    @property
    def webhooks(self) -> frozenset[str]:
        """The triggers that are fired by a webhook."""
        return frozenset(name for name, trigger in self._triggers.items() if trigger.webhook)

    def deliver(self, name: str, delivery: str, payload: Any, headers: dict[str, str]) -> bool:
        """Fire one of ``webhooks``; return whether the delivery is new. Durable on return.

        Raises:
            ClusterError: Another dispatcher acts.
        """
        trigger = self._triggers[name]
        data = {"payload": payload, "headers": headers}
        occasion = Occasion(
            trigger=name,
            mark=delivery,
            at=self._clock(),
            reason=f"webhook delivery {delivery}",
            data=data,
        )
        # Not in turn: a sender does not wait while a tick waits for the job server.
        with suppress(LeaseError):
            return self._fire(name, trigger, occasion, self._held())
        raise ClusterError("another process acts on this project's triggers", where=self._name)

    def status(self) -> dict[str, Any]:
        """Return whether this dispatcher acts, and what it could not do."""
        with self._turn:
            return {"acts": self._lease is not None, "troubles": dict(self._troubles)}

    def close(self) -> None:
        """Leave the triggers to another dispatcher at once."""
        with self._turn:
            if self._lease is not None:
                self._ledger.release(self._lease)
                self._lease = None

    def _hold(self) -> bool:
        """Hold the project's lease; say whether it is ours."""
        now_s = time.monotonic()
        if self._lease is None:
            try:
                name = LEASE.format(project=self._name)
                self._lease = self._ledger.acquire(name, self._owner, LEASE_TTL_S)
            except LeaseError:
                return False
            self._cursors.clear()
        elif now_s - self._renewed_s < _RENEW_EVERY_S:
            return True
        else:
            self._lease = self._ledger.renew(self._lease, LEASE_TTL_S)
        self._renewed_s = now_s
        return True

    def _held(self) -> Lease:
        if self._lease is None:
            raise LeaseError("the lease was given back")
        return self._lease

    # What happened

    def _look(self) -> None:
        now_s = time.monotonic()
        outside = now_s - self._looked_s >= _LOOK_EVERY_S
        if outside:
            self._looked_s = now_s
        for name, trigger in self._triggers.items():
            with self._trouble(name):
                cursor = self._cursor(name, trigger)
                if outside or trigger.source not in ("data", "commit"):
                    for occasion in self._lookout.occasions(name, trigger, cursor):
                        self._fire(name, trigger, occasion, self._held())

    def _cursor(self, name: str, trigger: Trigger) -> Cursor:
        if name not in self._cursors:
            self._cursors[name] = open_cursor(
                self._ledger, self._name, name, trigger, self._world, self._held()
            )
        return self._cursors[name]

    def _fire(self, name: str, trigger: Trigger, occasion: Occasion, fence: Lease) -> bool:
        if not occasion.skip and is_paused(self._ledger, self._name, name, trigger):
            occasion = occasion.model_copy(update={"skip": "paused"})
        firing = firing_of(self._name, occasion)
        return self._ledger.fire(firing, event=event_of(firing, firing.status), fence=fence)

    # What becomes of it

    def _follow(self) -> None:
        """Learn how the jobs stand."""
        running = self._firings("submitted")
        if not running:
            return
        with self._trouble("jobs"):
            outcomes = self._jobs.outcomes([firing.job or "" for firing in running])
            for firing in running:
                outcome = outcomes[firing.job or ""]
                if outcome.status != "running":
                    self._ended(firing, outcome)

    def _ended(self, firing: Firing, outcome: JobOutcome) -> None:
        trigger = self._triggers.get(firing.trigger)
        told = {"message": outcome.message.partition("\n")[0], "log": outcome.log}
        data = firing.data | {name: text for name, text in told.items() if text}
        if outcome.status == "succeeded" or self._has_succeeded(firing):
            self._change(firing, status="succeeded")
        elif "stopping" in firing.data:
            self._change(firing, status="cancelled")
        elif trigger is None:
            self._change(firing, status="failed", data=data)
        else:
            failure: Failure = "lost" if outcome.status == "lost" else "failures"
            failed = firing.model_copy(update={"data": data})
            self._change(firing, **after_failure(trigger, failed, self._clock(), failure))

    def _has_succeeded(self, firing: Firing) -> bool:
        """Say whether the firing's run succeeded, whatever became of its job."""
        told = self._ledger.events(project=self._name, kind="triggered")
        found = {event.run_id or "" for event in told if event.data.get("firing") == firing.key}
        runs = [self._ledger.run(run_id) for run_id in found]
        return any(run is not None and run.status == "succeeded" for run in runs)

    def _act(self) -> None:
        """Start, skip and stop what is due, of several triggers the longest waiting first."""
        found = [*self._firings("due"), *self._firings("submitted")]
        open_firings: dict[str, list[Firing]] = defaultdict(list)
        for firing in sorted(found, key=lambda firing: firing.at):
            open_firings[firing.trigger].append(firing)
        begun = {firing.trigger for firing in found if has_begun(firing)}
        for name, firings in open_firings.items():
            with self._trouble(name):
                for action in self._plan(name, firings, begun - {name}):
                    begun |= {name} if action.kind == "submit" else set()
                    self._do(name, action)

    def _plan(self, name: str, firings: list[Firing], begun: set[str]) -> list[Action]:
        trigger = self._triggers.get(name)
        if trigger is None:
            gone = [firing for firing in firings if firing.status == "due"]
            reason = "the trigger is no longer declared"
            return [Action(kind="skip", firing=firing, reason=reason) for firing in gone]
        return plan(
            trigger,
            firings,
            now=self._clock(),
            last_start=self._last_start(name) if trigger.min_interval else None,
            paused=is_paused(self._ledger, self._name, name, trigger),
            busy=any(self._run_the_same(trigger, other) for other in begun),
        )

    def _run_the_same(self, trigger: Trigger, name: str) -> bool:
        other = self._triggers.get(name)
        if other is None or trigger.makes_runs_of_its_own or other.makes_runs_of_its_own:
            return False
        return (trigger.workflow, trigger.overrides) == (other.workflow, other.overrides)

    def _last_start(self, name: str) -> datetime | None:
        by_hand = hand_prefix(self._name, name)
        found = self._ledger.firings(
            project=self._name, trigger=name, not_like=by_hand, begun=True, limit=1
        )
        return datetime.fromisoformat(found[0].data["started_at"]) if found else None

    def _do(self, name: str, action: Action) -> None:
        firing = action.firing
        if action.kind == "skip":
            reason = f"{firing.reason}; {action.reason}"
            self._change(firing, status="skipped", reason=reason)
        elif action.kind == "submit":
            self._submit(self._triggers[name], firing)
        else:
            self._stop(firing, action.reason)

    def _submit(self, trigger: Trigger, firing: Firing) -> None:
        """Start a firing's job, once: its id is on record before, and Ray refuses a known one."""
        attempt = firing.attempt + (firing.job is None)
        job = submission_id(firing, attempt)
        now = self._clock().astimezone(UTC).isoformat()
        data = firing.data | {"started_at": firing.data.get("started_at", now)}
        if firing.job is None:
            self._change(firing, attempt=attempt, job=job, data=data)
        told = {REASON_VARIABLE: reason_of(firing), FIRING_VARIABLE: firing.key}
        command = self._spec.command.with_more(*arguments(trigger, firing, attempt), **told)
        try:
            self._jobs.submit(job, command)
        except JobRefusedError as error:
            refused = firing.model_copy(
                update={"data": data | {"message": error.why or error.what}}
            )
            self._change(firing, **after_failure(trigger, refused, self._clock(), "refused"))
            raise
        self._change(firing, status="submitted", attempt=attempt, job=job)

    def _stop(self, firing: Firing, reason: str) -> None:
        """Ask a firing's job to end; the firing is over when the job is."""
        data = firing.data | {"stopping": reason}
        if firing.job is None:  # it waits to be tried again
            self._change(firing, status="cancelled", data=data)
            return
        if data != firing.data:
            self._change(firing, status="submitted", data=data)
        self._jobs.stop(firing.job)

    def _change(self, firing: Firing, **values: Any) -> None:
        event, status = None, values.get("status", firing.status)
        if status != firing.status:
            told = {name: values[name] for name in ("job", "attempt") if name in values}
            event = event_of(firing, status, **told)
        self._ledger.update_firing(firing.key, event=event, fence=self._held(), **values)

    def _firings(self, status: str) -> list[Firing]:
        return self._ledger.firings(project=self._name, status=status, limit=_MOST_AT_ONCE)

    @contextmanager
    def _trouble(self, name: str) -> Iterator[None]:
        """Keep one trigger's trouble from the others; it is tried again at the next tick."""
        try:
            yield
        except LedgerError:
            raise
        except Exception as error:
            known = isinstance(error, MlopsRayError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            if self._troubles.get(name) != text:
                self._troubles[name] = text
                data = {"trigger": name, "error": text}
                event = NewEvent(project=self._name, kind="trigger_trouble", data=data)
                self._ledger.apply([event], fence=self._held())
        else:
            self._troubles.pop(name, None)
