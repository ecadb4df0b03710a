"""Up to where each trigger has looked: from the ledger alone, so that it outlives the process."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from mlops_ray.cluster.observations import World
from mlops_ray.config.triggers import SOURCES, Trigger
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Event, Firing, Lease, NewEvent
from mlops_ray.orchestration.triggers import hand_prefix

DECLARED = "trigger_declared"
PAUSED = "trigger_paused"
RESUMED = "trigger_resumed"

_RECENT = 100


@dataclass
class Cursor:
    """Up to where one trigger has looked.

    ``since``: the moment of its newest occasion; ``event``: the id of the newest event; ``seen``: the
    newest version or commit. ``next``: before this moment its schedule has nothing.
    """

    since: datetime
    event: int
    seen: str = ""
    next: datetime | None = None


def open_cursor(
    ledger: Ledger, project: str, name: str, trigger: Trigger, world: World, fence: Lease
) -> Cursor:
    """Return up to where a trigger has looked; one that is new or changed begins now.

    Raises:
        LeaseError: The fence is no longer ours.
        MlopsRayError: The state that a new trigger begins at cannot be seen.
    """
    fingerprint = _fingerprint(trigger)
    declared = _newest(ledger.events(project=project, kind=DECLARED), name)
    if declared is None or declared.data["fingerprint"] != fingerprint:
        data = {"trigger": name, "fingerprint": fingerprint, "seen": _present(trigger, world)}
        ledger.apply([NewEvent(project=project, kind=DECLARED, data=data)], fence=fence)
        declared = _newest(ledger.events(project=project, kind=DECLARED), name)
        assert declared is not None
    cursor = Cursor(declared.at, declared.id, declared.data["seen"])
    by_hand = hand_prefix(project, name)
    recent = ledger.firings(project=project, trigger=name, not_like=by_hand, limit=_RECENT)
    for firing in reversed(recent):
        if firing.at >= declared.at:
            _move(cursor, firing)
    return cursor


def is_paused(ledger: Ledger, project: str, name: str, trigger: Trigger) -> bool:
    """Say whether a trigger is paused: by what was last said since its declaration, else by that."""
    kinds = (DECLARED, PAUSED, RESUMED)
    said = [_newest(ledger.events(project=project, kind=kind), name) for kind in kinds]
    newest = max((event for event in said if event), key=lambda event: event.id, default=None)
    if newest is None or newest.kind == DECLARED:
        return trigger.paused
    return newest.kind == PAUSED


def _move(cursor: Cursor, firing: Firing) -> None:
    cursor.since = max(cursor.since, firing.at)
    cursor.event = max(cursor.event, int(firing.data.get("event_id", 0)))
    cursor.seen = str(firing.data.get("seen", cursor.seen))


def _fingerprint(trigger: Trigger) -> str:
    decisive = {*SOURCES, "timezone", "paused"}
    return digest_json(trigger.model_dump(mode="json", include=decisive))


def _present(trigger: Trigger, world: World) -> str:
    if trigger.data is not None:
        return world.version(trigger.data, "")
    return world.head(trigger.commit) if trigger.commit is not None else ""


def _newest(events: list[Event], name: str) -> Event | None:
    return next((e for e in reversed(events) if e.data.get("trigger") == name), None)
