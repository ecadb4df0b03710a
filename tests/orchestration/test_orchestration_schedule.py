"""Schedules against an oracle that walks through time minute by minute, as a clock does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.config.triggers import Trigger
from mlops_ray.orchestration.schedule import (
    newest_occurrences,
    next_occurrence,
    occurrences,
)
from mlops_ray.orchestration.triggers import due_times, next_time

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
CHANGES = [
    ("UTC", datetime(2026, 3, 29)),
    ("Asia/Kolkata", datetime(2026, 3, 29)),
    ("Europe/Berlin", datetime(2026, 3, 29)),
    ("Europe/Berlin", datetime(2026, 10, 25)),
    ("America/New_York", datetime(2026, 3, 8)),
    ("America/New_York", datetime(2026, 11, 1)),
    ("America/St_Johns", datetime(2011, 11, 6)),
    ("Australia/Lord_Howe", datetime(2026, 4, 5)),
    ("Australia/Lord_Howe", datetime(2026, 10, 4)),
    ("Africa/Casablanca", datetime(2026, 2, 15)),
    ("America/Havana", datetime(2026, 3, 8)),
    ("Pacific/Apia", datetime(2011, 12, 30)),
]


def numbers(field: str, low: int, high: int) -> set[int]:
    """What a field allows, by its definition."""
    allowed: set[int] = set()
    for term in field.split(","):
        span, _, step = term.partition("/")
        first, _, last = span.partition("-")
        start, end = (low, high) if span == "*" else (int(first), int(last or first))
        allowed |= set(range(start, end + 1, int(step or 1)))
    return allowed


def fits(cron: str, wall: datetime) -> bool:
    minute, hour, day, month, weekday = cron.split()
    if wall.minute not in numbers(minute, 0, 59) or wall.hour not in numbers(hour, 0, 23):
        return False
    if wall.month not in numbers(month, 1, 12):
        return False
    days = wall.day in numbers(day, 1, 31)
    weekdays = wall.isoweekday() % 7 in {number % 7 for number in numbers(weekday, 0, 7)}
    either = not day.startswith("*") and not weekday.startswith("*")
    return days or weekdays if either else days and weekdays


def walked(cron: str, timezone: str, after: datetime, until: datetime) -> list[datetime]:
    """Every minute of real time, look at the clock on the wall."""
    zone, found = ZoneInfo(timezone), []
    minute, hour = cron.split()[:2]
    fixed = not minute.startswith("*") and not hour.startswith("*")
    moment = (after - 2 * DAY).replace(second=0, microsecond=0)
    latest = moment.astimezone(zone).replace(tzinfo=None)
    while moment + MINUTE <= until:
        moment += MINUTE
        wall = moment.astimezone(zone).replace(tzinfo=None)
        if not fixed:
            fired = fits(cron, wall)
        else:
            passed = [latest + n * MINUTE for n in range(1, (wall - latest) // MINUTE + 1)]
            fired = any(fits(cron, time) for time in passed)
            latest = max(latest, wall)
        if fired and moment > after:
            found.append(moment)
    return found


def field(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    return st.one_of(
        number.map(str),
        st.lists(number, min_size=2, max_size=3).map(lambda some: ",".join(map(str, some))),
        st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}"),
        st.just("*"),
        st.integers(2, 20).map(lambda step: f"*/{step}"),
    )


crons = st.tuples(
    field(0, 59),
    st.one_of(field(0, 23), field(0, 4)),
    st.sampled_from(["*", "*", "*/2", "29", "1-31"]),
    st.just("*"),
    st.sampled_from(["*", "*", "0", "1-5", "0,6"]),
).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(crons, st.sampled_from(CHANGES), st.integers(-1800, 1800), st.integers(1, 2000))
def test_occurrences_are_what_a_clock_on_the_wall_would_fire(
    cron: str, change: tuple[str, datetime], begin: int, length: int
) -> None:
    timezone, day = change
    after = day.replace(tzinfo=UTC) + begin * MINUTE
    until = after + length * MINUTE
    expected = walked(cron, timezone, after, until)
    assert occurrences(cron, timezone, after, until) == expected
    assert newest_occurrences(cron, timezone, after, until, 3) == expected[-3:]
    if expected:
        assert next_occurrence(cron, timezone, after) == expected[0]


@pytest.mark.parametrize(
    ("cron", "timezone", "day", "expected"),
    [
        ("30 2 * * *", "Europe/Berlin", "2026-03-29", ["03:00+02:00"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25", ["02:30+02:00"]),
        ("0,30 2 * * *", "Europe/Berlin", "2026-03-29", ["03:00+02:00"]),
        ("15 */2 * * *", "America/New_York", "2026-11-01", ["00:15-04:00", "02:15-05:00"]),
        (
            "*/30 1 * * *",
            "America/New_York",
            "2026-11-01",
            ["01:00-04:00", "01:30-04:00", "01:00-05:00", "01:30-05:00"],
        ),
    ],
)
def test_changes_of_clocks(cron: str, timezone: str, day: str, expected: list[str]) -> None:
    zone = ZoneInfo(timezone)
    start = datetime.fromisoformat(day).replace(tzinfo=zone)
    found = occurrences(cron, timezone, start - MINUTE, start.replace(hour=3, minute=30))
    shown = [moment.astimezone(zone).isoformat() for moment in found]
    assert [text[11:16] + text[19:] for text in shown] == expected


def test_a_leap_day_is_found_years_ahead() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    found = next_occurrence("0 0 * 2 MON#5", "UTC", start)
    assert found == datetime(2044, 2, 29, tzinfo=UTC)


def schedule(**values: object) -> Trigger:
    return Trigger.model_validate({"workflow": "train", "cron": "0 * * * *", **values})


def test_catching_up() -> None:
    since, now = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 3, 0, 30, tzinfo=UTC)

    def hours(**values: object) -> list[int]:
        return [o.at.hour for o in due_times("t", schedule(**values), since, now) if not o.skip]

    assert hours(catch_up="none") == []
    assert hours(catch_up="latest") == [0]
    assert hours(catch_up="all", catch_up_most=4, overlap="queue") == [21, 22, 23, 0]
    missed = due_times("t", schedule(catch_up="none"), since, now)
    assert [occasion.at.hour for occasion in missed] == [0]
    assert "missed" in missed[0].skip
    prompt = due_times("t", schedule(catch_up="none"), since, now.replace(minute=0, second=20))
    assert [occasion.skip for occasion in prompt] == [""]
    late = due_times("t", schedule(catch_up="none"), since, now.replace(minute=1, second=20))
    assert [occasion.skip for occasion in late] == [""]
    assert due_times("t", schedule(), now, now + MINUTE) == []


def test_an_occasion_is_marked_by_its_local_time() -> None:
    trigger = schedule(cron="0 3 * * *", timezone="Europe/Berlin")
    now = datetime(2026, 11, 22, 2, 0, 5, tzinfo=UTC)
    (occasion,) = due_times("nightly", trigger, now - DAY, now)
    assert occasion.mark == "2026-11-22T03:00:00+01:00"


@given(st.integers(0, 10_000))
@settings(max_examples=50)
def test_jitter_is_bounded_and_the_same_each_time(hour: int) -> None:
    trigger = schedule(jitter="10m")
    now = datetime(2026, 1, 1, tzinfo=UTC) + hour * timedelta(hours=1)
    (one,) = due_times("t", trigger, now - MINUTE, now)
    (other,) = due_times("t", trigger, now - 2 * MINUTE, now + 5 * MINUTE)
    assert one.not_before == other.not_before
    assert one.not_before is not None
    assert timedelta(0) <= one.not_before - now <= timedelta(minutes=10)
    upcoming = next_time("t", trigger, now - MINUTE)
    assert upcoming == one.not_before
