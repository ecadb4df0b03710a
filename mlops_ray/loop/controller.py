"""The controller that closes the circle: it watches, triggers a retraining, and sees it through.

    watching ──decide──► triggered ──submit──► retraining ──job ended──► watching

No Ray in here: the actor around it is in ``mlops_ray.loop.actor``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol

import pyarrow as pa

from mlops_ray.config.base import Frozen
from mlops_ray.config.monitoring import Loop, Monitoring
from mlops_ray.errors import ClusterError, MlopsRayError, MonitoringError
from mlops_ray.loop.policy import Decision, LoopState, decide
from mlops_ray.loop.state import ControllerState, StateStore, Trigger
from mlops_ray.metadata.delta import Delta
from mlops_ray.metadata.profile import Counts
from mlops_ray.metadata.types import Endpoint
from mlops_ray.monitoring.measurement import Measurement, ServedVersion
from mlops_ray.monitoring.monitor import Monitor
from mlops_ray.orchestration.jobs import JobCommand, JobOutcome, Jobs

_MOST_SUBMISSIONS = 3
_MOST_PASSES = 100


class ControllerSpec(Frozen):
    """Everything that a controller is told. ``clock`` virtual: time moves only by ``tick``."""

    project: str
    home: str
    endpoint: Endpoint
    monitoring: Monitoring
    loop: Loop
    retrain: JobCommand | None = None
    clock: Literal["wall", "virtual"] = "wall"


class World(Protocol):
    """What a controller reaches outside of itself, beside jobs."""

    def flush(self) -> None:
        """Make every replica write what it has answered; return when it can be read."""

    def news(self, positions: Mapping[str, int]) -> Delta | None:
        """Return what was answered beyond ``positions``, up to which all is remembered for good."""

    def served(self) -> ServedVersion:
        """Return the version that answers now."""

    def reference(self, served: ServedVersion) -> Mapping[str, Counts]:
        """Return the counts per feature of the rows that the version was trained on."""

    def record(self, kind: str, data: Mapping[str, Any]) -> None:
        """Append an event to the ledger."""

    def publish(self, state: ControllerState, measurement: Measurement | None) -> None:
        """Show the state as metrics."""


class Controller:
    """Watches one endpoint and retrains its model. All methods may be called from any thread.

    Its memory survives the process: each delta is journalled before ``observe`` returns, and each
    change of state is saved before it is acted upon.
    """

    def __init__(self, spec: ControllerSpec, store: StateStore, jobs: Jobs, world: World) -> None:
        self._spec = spec
        self._store = store
        self._jobs = jobs
        self._world = world
        self._memory = threading.RLock()
        self._turn = threading.RLock()
        self._monitor = Monitor(spec.monitoring)
        self._state = store.load(self._monitor)
        self._measurement: Measurement | None = None
        self._decision: Decision | None = None

    @property
    def spec(self) -> ControllerSpec:
        """What the controller was told."""
        return self._spec

    def configure(self, spec: ControllerSpec) -> None:
        """Follow another spec from now on; what is remembered stays."""
        with self._turn, self._memory:
            monitor = Monitor(spec.monitoring)
            self._store.save(self._state, self._monitor)
            self._state = self._store.load(monitor)
            self._monitor, self._spec = monitor, spec

    def begin(self, session: str, checkpoint: str | None = None) -> dict[str, Any]:
        """Start a session with an empty memory, or go back to a checkpoint of it.

        Raises:
            MonitoringError: There is no such checkpoint.
        """
        # What was answered until now is of an earlier time, and must not come in later.
        self._world.flush()
        with self._turn, self._memory:
            while not self.take_in():
                pass
            positions = self._monitor.positions
            self._monitor = Monitor(self._spec.monitoring)
            self._measurement = self._decision = None
            if checkpoint is None:
                self._state = ControllerState(session=session)
                self._store.clear()
            else:
                self._state = self._store.load_checkpoint(checkpoint, self._monitor)
            self._monitor.positions = positions
            self._save()
            return self.status()

    def checkpoint(self, name: str) -> None:
        """Keep the present state under a name, and of the older checkpoints the newest."""
        with self._memory:
            self._store.save_checkpoint(name, self._state, self._monitor)

    def observe(self, delta: Delta) -> None:
        """Take a delta in. It survives a crash once this has returned."""
        with self._memory:
            if self._monitor.observe(delta):
                self._store.journal(delta)

    def take_in(self) -> bool:
        """Take in what the replicas have written; each row counts once, whatever dies meanwhile.

        Replicas write on meanwhile, perhaps faster than this reads: it ends where it has come up to what
        was there, and at the latest after ``_MOST_PASSES``; the next call goes on from there.

        Returns:
            Whether it has come up to what was there.
        """
        with self._memory:
            for _ in range(_MOST_PASSES):
                delta = self._world.news(self._monitor.positions)
                if delta is None:
                    return True
                self.observe(delta)
                if not delta.more:
                    return True
            return False

    def tick(self, now: datetime, *, start: bool = True) -> dict[str, Any]:
        """Measure and decide as of ``now``; nothing new for a moment that was judged already.

        Args:
            now: The clock's time. Windows end here.
            start: Submit the retraining at once where one is decided. Otherwise the phase is
                ``triggered`` until ``start_retraining``.

        Returns:
            The status.
        """
        with self._turn:
            if self._state.now is None or now > self._state.now:
                self._see_version(now)
                self._world.flush()
                with self._memory:
                    self.take_in()
                    self._judge(now)
                self._world.publish(self._state, self._measurement)
            if start:
                self.start_retraining()
            return self.status()

    def start_retraining(self) -> dict[str, Any]:
        """Submit the retraining that was triggered; do nothing in another phase."""
        with self._turn:
            trigger = self._state.trigger
            if self._state.phase == "triggered" and trigger is not None:
                self._submit(trigger)
            return self.status()

    def poll(self, now: datetime | None = None) -> dict[str, Any]:
        """Look after a running retraining. ``now`` is the clock's time, where it is virtual."""
        with self._turn:
            trigger = self._state.trigger
            if self._state.phase == "retraining" and trigger is not None:
                with suppress(MlopsRayError):  # asked again at the next poll
                    submitted = trigger.submission_id
                    outcome = self._jobs.outcomes([submitted])[submitted]
                    if outcome.status == "lost" and trigger.submissions < _MOST_SUBMISSIONS:
                        self._submit(trigger)
                    elif outcome.status != "running":
                        self._finish(trigger, outcome, now)
            return self.status()

    def status(self) -> dict[str, Any]:
        """Return phase, clock, version in service, counters, newest measurement and decision."""
        with self._memory:
            document = self._state.model_dump(mode="json", exclude={"history_bytes"})
            return document | {
                "project": self._spec.project,
                "endpoint": self._spec.endpoint.model_dump(mode="json"),
                "rows_observed": self._monitor.rows_observed,
                "measurement": _dump(self._measurement),
                "decision": _dump(self._decision),
            }

    def history(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return what was measured, triggered and retrained, in order; of one kind or all."""
        with self._memory:
            return [entry for entry in self._store.history() if kind in (None, entry["kind"])]

    def rows(self, since: datetime, until: datetime) -> pa.Table:
        """Return what was answered with a time in [since, until), all of it; see ``LabelJoin``."""
        self._world.flush()
        with self._memory:
            self.take_in()
            return self._monitor.rows(since, until)

    def due(self, now: datetime) -> bool:
        """Return whether a clock that shows ``now`` has come to the next tick."""
        last = self._state.now
        return last is None or now - last >= self._spec.monitoring.every

    def _judge(self, now: datetime) -> None:
        served = self._state.served
        if served is None:
            raise MonitoringError("the endpoint did not say which version answers")
        measurement = self._monitor.measure(now, served, self._world.reference(served))
        loop_state = LoopState(
            now=now,
            measurement=measurement,
            retraining=self._state.phase != "watching",
            last_retraining_at=self._state.last_retraining_at,
            retrainings=self._state.retrainings,
        )
        decision = decide(loop_state, self._spec.loop, self._spec.monitoring)
        self._measurement, self._decision = measurement, decision
        verdict = decision.model_dump(mode="json", include={"action", "reason"})
        measured = verdict | measurement.model_dump(mode="json", exclude={"at"})
        self._note("measured", now, **measured)
        self._record("measured", {"at": now.isoformat(), **measured})
        self._change(now=now)
        if decision.action == "retrain" and self._spec.retrain is not None:
            self._trigger(now, decision, served)
        self._save()

    def _trigger(self, now: datetime, decision: Decision, served: ServedVersion) -> None:
        number = self._state.retrainings + 1
        session = f"-{self._state.session}" if self._state.session else ""
        moment = now.strftime("%Y%m%dT%H%M%SZ")
        trigger = Trigger(
            at=now,
            number=number,
            submission_id=f"{self._spec.project}{session}-retrain-{number}-{moment}",
            version=served.version,
            reason=decision.reason,
            evidence=decision.evidence,
        )
        self._change(phase="triggered", trigger=trigger, last_retraining_at=now, retrainings=number)
        self._note("trigger", now, **trigger.model_dump(mode="json", exclude={"at"}))
        self._record("trigger", trigger.model_dump(mode="json"))

    def _submit(self, trigger: Trigger) -> None:
        command = self._spec.retrain
        if command is None:
            return
        submissions = trigger.submissions + 1
        until = trigger.at.strftime("%Y-%m-%dT%H:%M:%SZ")
        trigger = trigger.model_copy(
            update={"submissions": submissions, "submitted_s": trigger.submitted_s or time.time()}
        )
        try:
            self._jobs.submit(trigger.submission_id, command.with_more(f"until={until}"))
        except ClusterError as error:
            self._finish(trigger, JobOutcome(status="failed", message=str(error)), None)
            return
        with self._memory:
            self._change(phase="retraining", trigger=trigger)
            self._save()
        self._world.publish(self._state, self._measurement)

    def _finish(self, trigger: Trigger, outcome: JobOutcome, now: datetime | None) -> None:
        """Record how a retraining ended. A failed one counts for the cooldown like any other."""
        at = now or self._state.now or trigger.at
        self._see_version(at)
        served = self._state.served
        version = served.version if served else trigger.version
        result = {
            "number": trigger.number,
            "triggered_at": trigger.at.isoformat(),
            "submission_id": trigger.submission_id,
            "outcome": "failed" if outcome.status == "lost" else outcome.status,
            "promoted": version != trigger.version,
            "from_version": trigger.version,
            "version": version,
            "wall_s": round(time.time() - trigger.submitted_s, 3),
            "message": outcome.message or ("the job is gone" if outcome.status == "lost" else ""),
            "log": outcome.log,
        }
        with self._memory:
            self._change(
                phase="watching",
                trigger=None,
                promotions=self._state.promotions + int(version != trigger.version),
                failures=self._state.failures + int(result["outcome"] == "failed"),
            )
            self._note("retraining", at, **result)
            self._save()
        self._record("retraining", {"at": at.isoformat(), **result})
        self._world.publish(self._state, self._measurement)

    def _see_version(self, now: datetime) -> None:
        served = self._world.served()
        with self._memory:
            known = self._state.served
            if known is None or known.version != served.version:
                self._note("served", now, **served.model_dump(mode="json"))
            self._change(served=served)

    def _record(self, kind: str, data: Mapping[str, Any]) -> None:
        self._world.record(kind, {"session": self._state.session, **data})

    def _note(self, kind: str, at: datetime, **data: Any) -> None:
        size = self._store.append_history({"kind": kind, **data, "at": at.isoformat()})
        self._change(history_bytes=size)

    def _change(self, **values: Any) -> None:
        self._state = self._state.model_copy(update=values)

    def _save(self) -> None:
        self._store.save(self._state, self._monitor)


def _dump(value: Frozen | None) -> dict[str, Any] | None:
    return None if value is None else value.model_dump(mode="json")


def deadline(status: Mapping[str, Any], budget: timedelta) -> datetime | None:
    """Return until when, by the clock, the retraining may last; None when there is none."""
    trigger = status["trigger"]
    return None if trigger is None else datetime.fromisoformat(trigger["at"]) + budget
