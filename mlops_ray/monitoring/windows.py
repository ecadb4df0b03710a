"""Live profiles in daily buckets, summed to sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from mlops_ray.errors import DataError
from mlops_ray.metadata.profile import Profile, merge

_DAY = timedelta(days=1)


class ProfileWindows:
    """Counts of live rows by UTC day, apart for each reference that they were binned with.

    Adding is commutative and associative, so that replicas may report in any order. A window is the
    sum of the days that it touches: its start is rounded down to a day.
    """

    def __init__(self) -> None:
        self._days: dict[str, dict[str, Profile]] = {}

    def add(self, reference_digest: str, buckets: Mapping[str, Profile]) -> None:
        """Add counts by UTC day (``2013-03-01``), all or, where it raises, none.

        Raises:
            DataError: A key is not a day.
        """
        days = self._days.get(reference_digest, {})
        merged: dict[str, Profile] = {}
        for day, profile in buckets.items():
            _start(day)
            merged[day] = days[day].merge(profile) if day in days else profile
        self._days[reference_digest] = days | merged

    def window(self, reference_digest: str, now: datetime, window: timedelta) -> Profile:
        """Return the counts of the days that lie, at least in part, in (now − window, now]."""
        days = self._days.get(reference_digest, {})
        return merge(
            profile
            for day, profile in days.items()
            if _start(day) <= now and _start(day) + _DAY > now - window
        )

    def forget(self, now: datetime, window: timedelta) -> None:
        """Drop the days that no window of that length will touch again."""
        for digest in list(self._days):
            days = self._days[digest]
            kept = {d: p for d, p in days.items() if _start(d) + _DAY > now - window}
            if kept:
                self._days[digest] = kept
            else:
                del self._days[digest]

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON value: digest → day → profile."""
        return {
            digest: {day: profile.to_json() for day, profile in days.items()}
            for digest, days in self._days.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProfileWindows:
        """Read what ``to_json`` wrote."""
        windows = cls()
        for digest, days in value.items():
            windows.add(digest, {day: Profile.from_json(item) for day, item in days.items()})
        return windows


def is_day(day: str) -> bool:
    """Say whether a window can hold this day: years that the calendar has not, none can."""
    try:
        date.fromisoformat(day)
    except ValueError:
        return False
    return True


def _start(day: str) -> datetime:
    try:
        return datetime.combine(date.fromisoformat(day), time(), UTC)
    except ValueError as error:
        raise DataError(
            f"{day!r} is not a day",
            where="profile buckets",
            fix="name buckets by the UTC day of the prediction time, such as 2013-03-01",
        ) from error
