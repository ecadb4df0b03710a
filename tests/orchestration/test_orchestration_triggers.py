"""What becomes of firings: pure decisions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlops_ray.config.triggers import Trigger
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Firing
from mlops_ray.orchestration.triggers import (
    FIRING_VARIABLE,
    Occasion,
    after_failure,
    arguments,
    by_hand,
    firing_of,
    is_by_hand,
    note_firing,
    plan,
    submission_id,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def trigger(**values: Any) -> Trigger:
    if values.get("overlap") == "allow":
        values.setdefault("overrides", ["until={at}"])
    return Trigger.model_validate({"workflow": "train", "event": "e", **values})


def firing(number: int, status: str = "due", attempt: int = 0, **data: Any) -> Firing:
    return Firing.model_validate(
        {
            "key": f"p/t@{number}",
            "project": "p",
            "trigger": "t",
            "at": START + number * MINUTE,
            "status": status,
            "attempt": attempt,
            "job": "job" if status == "submitted" else None,
            "data": data,
        }
    )


def planned(declared: Trigger, *firings: Firing, **options: Any) -> dict[str, str]:
    now = options.pop("now", START + timedelta(hours=1))
    actions = plan(declared, firings, now=now, **options)
    return {action.firing.key.partition("@")[2]: action.kind for action in actions}


RUNNING = firing(1, "submitted", attempt=1)


@pytest.mark.parametrize(
    ("overlap", "alone", "behind"),
    [
        ("skip", {"2": "submit", "3": "skip"}, {"2": "skip", "3": "skip"}),
        ("queue", {"2": "submit"}, {}),
        ("cancel", {"2": "skip", "3": "submit"}, {"2": "skip", "1": "stop"}),
        ("allow", {"2": "submit", "3": "submit"}, {"2": "submit", "3": "submit"}),
    ],
)
def test_overlap(overlap: str, alone: dict[str, str], behind: dict[str, str]) -> None:
    declared = trigger(overlap=overlap)
    assert planned(declared, firing(3), firing(2)) == alone
    assert planned(declared, firing(3), RUNNING, firing(2)) == behind


def test_nothing_new_goes_while_another_trigger_runs_the_same() -> None:
    assert planned(trigger(), firing(2), busy=True) == {}
    assert planned(trigger(overlap="skip"), firing(2), busy=True) == {}
    assert planned(trigger(), firing(1, attempt=1), firing(2), busy=True) == {"1": "submit"}


def test_schedules_skip_and_the_rest_queues() -> None:
    assert trigger().when_busy == "queue"
    assert Trigger(workflow="w", cron="@daily").when_busy == "skip"


def test_of_those_that_wait_for_an_interval_the_newest_goes() -> None:
    declared = trigger(min_interval="30m")
    last = START + timedelta(minutes=50)
    waiting = (firing(2), firing(3))
    assert planned(declared, *waiting, last_start=last) == {"2": "skip"}
    later = START + timedelta(minutes=80)
    assert planned(declared, *waiting, last_start=last, now=later) == {"2": "skip", "3": "submit"}
    assert planned(declared, *waiting) == {"2": "skip", "3": "submit"}


def test_a_firing_waits_until_nothing_new_came_for_a_while() -> None:
    declared = trigger(debounce="10m")
    assert planned(declared, firing(2), firing(3), now=START + 12 * MINUTE) == {"2": "skip"}
    assert planned(declared, firing(3), now=START + 13 * MINUTE) == {"3": "submit"}


def test_by_hand_waits_for_no_interval_and_no_pause() -> None:
    pushed = by_hand("p", "t", "ann")
    assert is_by_hand(pushed)
    assert not is_by_hand(firing(1))
    assert pushed.key != by_hand("p", "t", "ann").key
    declared = trigger(debounce="10h", min_interval="10h")
    now = datetime.now(UTC)
    actions = plan(declared, [pushed], now=now, last_start=now, paused=True)
    assert [action.kind for action in actions] == ["submit"]
    assert planned(trigger(), firing(1), paused=True) == {}


def test_a_retry_goes_when_its_pause_is_over_and_holds_its_place() -> None:
    held = (START + 90 * MINUTE).isoformat()
    waiting = firing(1, attempt=1, not_before=held)
    assert planned(trigger(), waiting, firing(2)) == {}
    later = START + 90 * MINUTE
    assert planned(trigger(), waiting, firing(2), now=later) == {"1": "submit"}
    assert planned(trigger(overlap="cancel"), waiting, firing(2), now=later) == {"1": "stop"}


def test_failures_are_tried_again_and_lost_jobs_do_not_count() -> None:
    declared = trigger(retries=2, backoff={"first": "10s", "factor": 3, "jitter": 0})
    current = RUNNING
    pauses = []
    while True:
        change = after_failure(declared, current, START, "failures")
        if change["status"] == "failed":
            break
        pauses.append(datetime.fromisoformat(change["data"]["not_before"]) - START)
        current = current.model_copy(update={"data": change["data"]})
        lost = after_failure(declared, current, START, "lost")
        assert lost["status"] == "due"
        assert lost["data"]["not_before"] == START.isoformat()
    assert pauses == [timedelta(seconds=10), timedelta(seconds=30)]
    assert change["data"]["failures"] == 3


def test_a_job_that_is_lost_again_and_again_is_given_up() -> None:
    data: dict[str, Any] = {}
    for _ in range(3):
        change = after_failure(trigger(), firing(1, "submitted", 1, **data), START, "lost")
        assert change["status"] == "due"
        data = change["data"]
    given_up = after_failure(trigger(), firing(1, "submitted", 1, **data), START, "lost")
    assert given_up["status"] == "failed"


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["skip", "queue", "cancel", "allow"]),
    st.lists(st.tuples(st.sampled_from(["due", "submitted"]), st.integers(0, 2)), max_size=6),
    st.booleans(),
)
def test_plans_act_once_on_each_and_never_run_two_that_may_not(
    overlap: str, states: list[tuple[str, int]], paused: bool
) -> None:
    firings = [
        firing(number, status, max(attempt, int(status == "submitted")))
        for number, (status, attempt) in enumerate(states)
    ]
    actions = plan(trigger(overlap=overlap), firings, now=START + 60 * MINUTE, paused=paused)
    keys = [action.firing.key for action in actions]
    assert len(keys) == len(set(keys))
    begun = {f.key for f in firings if f.status == "submitted" or f.attempt}
    fresh = {a.firing.key for a in actions if a.kind == "submit"} - begun
    if overlap != "allow":
        assert len(fresh) <= (0 if begun else 1)
    if paused:
        assert not fresh
    assert all(a.firing.key in begun for a in actions if a.kind == "stop")
    assert all(a.firing.key not in begun for a in actions if a.kind == "skip")
    waiting = {f.key for f in firings} - begun
    if overlap == "allow" and not paused:
        assert fresh == waiting


def test_keys_jobs_and_arguments() -> None:
    at = datetime(2026, 11, 22, 3, tzinfo=UTC)
    occasion = Occasion(trigger="nightly", mark="x" * 500, at=at, reason="r")
    made = firing_of("p", occasion)
    assert made.key.startswith("p/nightly@")
    assert len(submission_id(made, 1)) < 64
    assert submission_id(made, 1) != submission_id(made, 2)
    declared = trigger(overrides=["until='{at}'", "seed=3"])
    first = ("workflow=train", "until='2026-11-22T03:00:00Z'", "seed=3")
    assert arguments(declared, made, 1) == (*first, "--fresh")
    assert arguments(declared, made, 2) == first


def test_a_run_notes_which_firing_it_is_of(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    note_firing(ledger, "p", "run-1")
    assert ledger.events(run_id="run-1") == []
    made = firing(1, payload={"ref": "main"})
    ledger.fire(made)
    monkeypatch.setenv(FIRING_VARIABLE, made.key)
    note_firing(ledger, "p", "run-1")
    (event,) = ledger.events(run_id="run-1")
    assert (event.kind, event.data["firing"]) == ("triggered", made.key)
    assert event.data["data"]["payload"] == {"ref": "main"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cron": "61 * * * *"}, "Bad minute"),
        ({"cron": "* * * * * *"}, "five fields"),
        ({"cron": "0 0 31 2 *"}, "day"),
        ({"cron": "@dayly"}, "@daily"),
        ({"cron": "@daily", "timezone": "Europe/Berlim"}, "Did you mean Europe/Berlin"),
        ({"cron": "@daily", "commit": "main"}, "cron and commit"),
        ({"commit": "main", "timezone": "Asia/Tokyo"}, "with cron"),
        ({"commit": "--all"}, "pattern"),
        ({"cron": "@daily", "catch_up": "all"}, "queue"),
        ({"overrides": ["workflow=x"]}, "key of its own"),
        ({"overlap": "allow"}, "differs each time"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Trigger.model_validate({"workflow": "w", **values})


@pytest.mark.parametrize("source", [{"cron": "@daily"}, {"drift": True}, {"commit": "main"}, {}])
def test_a_trigger_is_read_back_as_it_was_written(source: dict[str, Any]) -> None:
    declared = Trigger.model_validate({"workflow": "w", "jitter": 0, **source})
    assert Trigger.model_validate_json(declared.model_dump_json(by_alias=True)) == declared


def test_true_means_as_monitoring_says() -> None:
    plain = Trigger.model_validate({"workflow": "w", "drift": True})
    bound = Trigger.model_validate({"workflow": "w", "drift": {"threshold": 0.3}})
    assert (plain.source, plain.bounds) == ("drift", {})
    assert bound.bounds == {"threshold": 0.3}
    assert Trigger(workflow="w").source == "hand"
