"""What fires, and what becomes of a firing: pure functions of what is known.

A trigger's source gives *occasions*; an occasion becomes a *firing* in the ledger, once; a firing
becomes a job, or is skipped.

    due ──submit──► submitted ──► succeeded, failed, cancelled
     ▲                  │
     └──── retry ───────┘          due ──► skipped
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol
from zoneinfo import ZoneInfo

from pydantic import Field

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.config.triggers import MOMENT, Trigger
from mlops_ray.metadata.records import Firing, NewEvent
from mlops_ray.orchestration.retries import delay_s
from mlops_ray.orchestration.schedule import newest_occurrences, next_occurrence

REASON_VARIABLE = "MLOPS_RAY_REASON"
"""Environment variable of a job: why it runs, for a person."""

FIRING_VARIABLE = "MLOPS_RAY_FIRING"
"""Environment variable of a job: the key of the firing that it is of."""

BY_HAND = "hand"
ON_TIME = timedelta(minutes=5)
"""An occurrence of a schedule that is younger than this was not missed."""

_MOST_BORNE = 3

Failure = Literal["failures", "lost", "refused"]
"""How an attempt has failed: its job did, the cluster has lost it, or never took it."""


class Occasion(Frozen):
    """Something happened that a trigger waits for. ``mark`` tells one occasion from another."""

    trigger: str
    mark: str
    at: Instant
    reason: str
    data: dict[str, Any] = Field(default_factory=dict)
    not_before: Instant | None = None
    skip: str = ""


class Action(Frozen):
    """What to do with a firing now: start a job, skip it, or stop the job that it has."""

    kind: Literal["submit", "skip", "stop"]
    firing: Firing
    reason: str = ""


class FiringLedger(Protocol):
    """What of the ledger is needed to note which firing a run is of."""

    def firings(self, *, key: str | None = None) -> list[Firing]:
        """Return firings, newest first."""

    def append(self, project: str, kind: str, data: dict[str, Any], *, run_id: str) -> None:
        """Append an event."""


def firing_of(project: str, occasion: Occasion) -> Firing:
    """Return the firing that an occasion makes. Equal occasions make firings of one key."""
    later = {"not_before": occasion.not_before.isoformat()} if occasion.not_before else {}
    return Firing(
        key=f"{project}/{occasion.trigger}@{occasion.mark}",
        project=project,
        trigger=occasion.trigger,
        at=occasion.at,
        status="skipped" if occasion.skip else "due",
        reason=f"{occasion.reason}; {occasion.skip}" if occasion.skip else occasion.reason,
        data=occasion.data | later,
    )


def by_hand(project: str, name: str, person: str) -> Firing:
    """Return a new firing by hand: it waits for no interval and also goes when paused."""
    now = datetime.now(UTC)
    mark = f"{BY_HAND}-{now:%Y%m%dT%H%M%S}-{os.urandom(3).hex()}"
    reason = f"by hand, {person}" if person else "by hand"
    return firing_of(project, Occasion(trigger=name, mark=mark, at=now, reason=reason))


def is_by_hand(firing: Firing) -> bool:
    """Say whether a person has fired it."""
    return firing.key.startswith(hand_prefix(firing.project, firing.trigger))


def hand_prefix(project: str, trigger: str) -> str:
    """Return how the keys of a trigger's firings by hand begin."""
    return f"{project}/{trigger}@{BY_HAND}-"


def event_of(firing: Firing, status: str, **told: Any) -> NewEvent:
    """Return the event which says that a firing stands so from now on."""
    data = {"firing": firing.key, "trigger": firing.trigger, "reason": firing.reason, **told}
    return NewEvent(project=firing.project, kind=f"firing_{status}", data=data)


def has_begun(firing: Firing) -> bool:
    """Say whether a firing that is not over has a job, or had one that is to be tried again."""
    return firing.status == "submitted" or firing.attempt > 0


def due_times(name: str, trigger: Trigger, since: datetime, now: datetime) -> list[Occasion]:
    """Return the occasions of a schedule in (since, now] that are to be fired, oldest first.

    Where all that is left were missed, the newest comes as one to be skipped: it is on record, and
    the next look begins after it.
    """
    if trigger.cron is None:
        return []
    most = {"none": 1, "latest": 1, "all": trigger.catch_up_most}[trigger.catch_up]
    found = newest_occurrences(trigger.cron, trigger.timezone, since, now, most + 1)
    occasions = [_occurrence(name, trigger, moment) for moment in found[-most:]]
    if trigger.catch_up == "none" and found and found[-1] <= now - ON_TIME:
        missed = "missed while nothing watched"
        return [occasions[-1].model_copy(update={"skip": missed})]
    if len(found) > most:
        data = {"earlier_ones_missed": True}
        occasions[0] = occasions[0].model_copy(update={"data": occasions[0].data | data})
    return occasions


def next_time(name: str, trigger: Trigger, now: datetime) -> datetime | None:
    """Return when a schedule goes next, in its own time zone; None for other triggers."""
    if trigger.cron is None:
        return None
    moment = next_occurrence(trigger.cron, trigger.timezone, now)
    return moment and jittered(name, trigger, moment).astimezone(ZoneInfo(trigger.timezone))


def jittered(name: str, trigger: Trigger, moment: datetime) -> datetime:
    """Return when an occurrence goes: up to ``jitter`` later, the same each time one asks."""
    drawn = hashlib.blake2b(f"{name}@{moment.isoformat()}".encode(), digest_size=8).digest()
    share = int.from_bytes(drawn, "big") / 2**64
    return moment + trigger.jitter * share


def plan(
    trigger: Trigger,
    firings: Iterable[Firing],
    *,
    now: datetime,
    last_start: datetime | None = None,
    paused: bool = False,
    busy: bool = False,
) -> list[Action]:
    """Return what to do with the firings of one trigger that are not over.

    Args:
        trigger: As declared.
        firings: All that are due or submitted.
        now: The present moment.
        last_start: When a firing of the trigger, other than by hand, was last started.
        paused: Only firings by hand, and jobs begun before, go on.
        busy: A job of another trigger runs the same: nothing new goes now.
    """
    ordered = sorted(firings, key=lambda firing: (firing.at, firing.key))
    begun = [firing for firing in ordered if has_begun(firing)]
    waiting = [firing for firing in ordered if firing not in begun]
    hand = [firing for firing in waiting if is_by_hand(firing)]
    rest = [] if paused else [firing for firing in waiting if not is_by_hand(firing)]
    settled, superseded = _settle(trigger, rest, now, last_start)
    ready = sorted([*hand, *settled], key=lambda firing: (firing.at, firing.key))
    actions = superseded + ([] if busy else _overlap(trigger, ready, begun))
    stopped = {action.firing.key for action in actions if action.kind == "stop"}
    again = [firing for firing in begun if firing.status == "due" and _is_ripe(firing, now)]
    actions += [_submit(firing) for firing in again if firing.key not in stopped]
    return actions


def after_failure(
    trigger: Trigger, firing: Firing, now: datetime, failure: Failure
) -> dict[str, Any]:
    """Return how a firing changes whose attempt has failed.

    That a job is lost or refused does not count as a failure of the workflow: three of either are
    borne. One that was refused is submitted again as it was.
    """
    count = firing.data.get(failure, 0) + 1
    data = firing.data | {failure: count}
    if count > (trigger.retries if failure == "failures" else _MOST_BORNE):
        return {"status": "failed", "data": data}
    pause_s = 0.0 if failure == "lost" else delay_s(trigger.backoff, count, random.random())
    data["not_before"] = (now + timedelta(seconds=pause_s)).isoformat()
    return {"status": "due", "data": data} | ({} if failure == "refused" else {"job": None})


def submission_id(firing: Firing, attempt: int) -> str:
    """Return the id of a firing's job: the same for the same attempt, so that it starts once."""
    digest = hashlib.blake2b(firing.key.encode(), digest_size=6).hexdigest()
    return f"{firing.project}-{firing.trigger}-{digest}-{attempt}"


def arguments(trigger: Trigger, firing: Firing, attempt: int) -> tuple[str, ...]:
    """Return what follows ``mlops-ray run`` and the project's own overrides.

    The first attempt begins a new run, a later one goes on where that one failed.
    """
    moment = firing.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    given = [text.replace(MOMENT, moment) for text in trigger.overrides]
    fresh = ["--fresh"] if attempt == 1 else []
    return (f"workflow={trigger.workflow}", *given, *fresh)


def reason_of(firing: Firing) -> str:
    """Return why a firing's run runs."""
    return f"trigger {firing.trigger} ({firing.reason})"


def note_firing(ledger: FiringLedger, project: str, run_id: str) -> None:
    """Append an event ``triggered`` to a run whose job a trigger started; else do nothing.

    It holds the firing's data: what the webhook was sent, which version is new.
    """
    key = os.environ.get(FIRING_VARIABLE)
    if not key:
        return
    data = next(
        (f.model_dump(mode="json", include={"at", "data"}) for f in ledger.firings(key=key)), {}
    )
    ledger.append(project, "triggered", {"firing": key, **data}, run_id=run_id)


def _occurrence(name: str, trigger: Trigger, moment: datetime) -> Occasion:
    local = moment.astimezone(ZoneInfo(trigger.timezone)).isoformat()
    return Occasion(
        trigger=name,
        mark=local,
        at=moment,
        reason=local,
        not_before=jittered(name, trigger, moment) if trigger.jitter else None,
    )


def _settle(
    trigger: Trigger, waiting: Sequence[Firing], now: datetime, last_start: datetime | None
) -> tuple[list[Firing], list[Action]]:
    """Return the firings that may go, and what is done with those that a newer one replaces."""
    if not (trigger.debounce or trigger.min_interval):
        return [firing for firing in waiting if _is_ripe(firing, now)], []
    if not waiting:
        return [], []
    *older, newest = waiting
    skipped = [_skip(firing, f"{newest.key} is newer") for firing in older]
    quiet = now >= newest.at + trigger.debounce
    free = last_start is None or now >= last_start + trigger.min_interval
    return ([newest] if quiet and free and _is_ripe(newest, now) else []), skipped


def _overlap(trigger: Trigger, ready: list[Firing], begun: list[Firing]) -> list[Action]:
    rule = trigger.when_busy
    if not ready or rule == "allow":
        return [_submit(firing) for firing in ready]
    if rule == "cancel":
        *older, newest = ready
        skipped = [_skip(firing, f"{newest.key} is newer") for firing in older]
        if not begun:
            return [*skipped, _submit(newest)]
        stops = [
            Action(kind="stop", firing=firing, reason=f"{newest.key} takes its place")
            for firing in begun
        ]
        return [*skipped, *stops]
    if begun:
        held = rule == "queue"
        return [] if held else [_skip(firing, f"{begun[0].key} was running") for firing in ready]
    first, *others = ready
    skipped = [] if rule == "queue" else [_skip(firing, f"{first.key} runs") for firing in others]
    return [_submit(first), *skipped]


def _submit(firing: Firing) -> Action:
    return Action(kind="submit", firing=firing)


def _skip(firing: Firing, reason: str) -> Action:
    return Action(kind="skip", firing=firing, reason=reason)


def _is_ripe(firing: Firing, now: datetime) -> bool:
    held = firing.data.get("not_before")
    return held is None or now >= datetime.fromisoformat(held)
