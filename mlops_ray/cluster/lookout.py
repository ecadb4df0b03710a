"""What has happened that a trigger waits for, since it looked last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from mlops_ray.cluster.cursors import Cursor
from mlops_ray.cluster.observations import World
from mlops_ray.config.project import Project
from mlops_ray.config.triggers import Trigger
from mlops_ray.errors import MlopsRayError
from mlops_ray.loop.policy import drift_breaches, performance_breaches
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Event
from mlops_ray.monitoring.measurement import Measurement
from mlops_ray.orchestration.schedule import next_occurrence
from mlops_ray.orchestration.triggers import Occasion, due_times

_ENDS = {
    "succeeded": ("run_succeeded",),
    "failed": ("run_failed",),
    "any": ("run_succeeded", "run_failed", "run_cancelled"),
}


class Lookout:
    """Looks at the clock, the world and the ledger's events for one project's triggers."""

    def __init__(
        self, project: Project, ledger: Ledger, world: World, clock: Callable[[], datetime]
    ) -> None:
        self._project = project
        self._ledger = ledger
        self._world = world
        self._clock = clock

    def occasions(self, name: str, trigger: Trigger, cursor: Cursor) -> Iterator[Occasion]:
        """Yield what is new; the cursor moves past an occasion when the next one is asked for."""
        if trigger.cron is not None:
            yield from self._due_times(name, trigger, cursor)
        elif trigger.data is not None:
            seen = self._world.version(trigger.data, cursor.seen)
            reason = f"{trigger.data}@{seen.rpartition(':')[2]}"
            if seen:  # else the table is gone
                yield from self._changed(name, cursor, seen, seen, reason)
        elif trigger.commit is not None:
            seen = self._world.head(trigger.commit)
            # A branch can come back to a commit: what went before tells the two apart.
            mark = f"{seen}~{cursor.since:%Y%m%dT%H%M%S.%f}"
            reason = f"{trigger.commit} at {seen[:12]}"
            yield from self._changed(name, cursor, seen, mark, reason)
        else:
            for event in self._new_events(trigger, cursor.event):
                occasion = self._read_event(name, trigger, cursor, event)
                if occasion is not None:
                    yield occasion
                cursor.event = event.id

    def _due_times(self, name: str, trigger: Trigger, cursor: Cursor) -> Iterator[Occasion]:
        now = self._clock()
        if cursor.next is not None and now < cursor.next:
            return
        yield from due_times(name, trigger, cursor.since, now)
        cursor.since = max(cursor.since, now)
        assert trigger.cron is not None
        upcoming = next_occurrence(trigger.cron, trigger.timezone, cursor.since)
        cursor.next = upcoming or datetime.max.replace(tzinfo=UTC)

    def _changed(
        self, name: str, cursor: Cursor, seen: str, mark: str, reason: str
    ) -> Iterator[Occasion]:
        if seen == cursor.seen:
            return
        now, data = self._clock(), {"seen": seen, "before": cursor.seen}
        yield Occasion(trigger=name, mark=mark, at=now, reason=reason, data=data)
        cursor.seen, cursor.since = seen, max(cursor.since, now)

    def _new_events(self, trigger: Trigger, after: int) -> list[Event]:
        kinds: tuple[str, ...] = ()
        if trigger.after is not None:
            kinds = _ENDS[trigger.after.status]
        elif trigger.event is not None:
            kinds = (trigger.event,)
        elif trigger.drift is not None or trigger.performance is not None:
            kinds = ("measured",)
        found = [
            self._ledger.events(project=self._project.name, kind=k, after=after) for k in kinds
        ]
        return sorted((event for events in found for event in events), key=lambda event: event.id)

    def _read_event(
        self, name: str, trigger: Trigger, cursor: Cursor, event: Event
    ) -> Occasion | None:
        """Return what an event means; the cursor moves past one that cannot be read.

        Raises:
            MlopsRayError: The event cannot be read, or the ledger cannot.
        """
        try:
            return self._of_event(name, trigger, event)
        except MlopsRayError:
            raise
        except Exception as error:
            cursor.event = event.id
            raise MlopsRayError(
                f"event {event.id} ({event.kind}) cannot be read, and is passed over",
                why=f"{type(error).__name__}: {error}",
            ) from error

    def _of_event(self, name: str, trigger: Trigger, event: Event) -> Occasion | None:
        mark, reason = str(event.id), f"{event.kind} {event.id}"
        data: dict[str, Any] = {"event_id": event.id}
        if trigger.after is not None:
            run = self._ledger.run(event.run_id or "")
            if run is None or run.workflow != trigger.after.workflow:
                return None
            status = event.kind.removeprefix("run_")
            mark, reason = f"{run.run_id}:{status}", f"{run.workflow} {status}, run {run.run_id}"
            data |= {"run_id": run.run_id, "status": status}
        elif trigger.event is not None:
            data |= {"event": event.data, "run_id": event.run_id}
        else:
            breaches = self._breaches(trigger, event)
            if not breaches:
                return None
            mark, reason = str(event.data["at"]), "; ".join(breaches)
        return Occasion(trigger=name, mark=mark, at=event.at, reason=reason, data=data)

    def _breaches(self, trigger: Trigger, event: Event) -> list[str]:
        """Return what a measurement has too much of. Those of a replay do not count."""
        if event.run_id is not None:
            return []
        fields = Measurement.model_fields
        known = {name: value for name, value in event.data.items() if name in fields}
        measured = Measurement.model_validate(known)
        monitoring = self._project.monitoring
        if trigger.drift is not None:
            bound = monitoring.drift.model_copy(update=trigger.bounds)
            return list(drift_breaches(measured.drift, bound))
        limit = monitoring.performance.model_copy(update=trigger.bounds)
        return list(performance_breaches(measured.performance, limit))
