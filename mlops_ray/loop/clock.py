"""Time, as the loop sees it: the wall's, or a virtual one that only moves when told to."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Protocol

from mlops_ray.errors import MonitoringError


class Clock(Protocol):
    """Something that knows what time it is."""

    def now(self) -> datetime:
        """Return the present moment, in UTC."""


class WallClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """Return the present moment, in UTC."""
        return datetime.now(UTC)


class VirtualClock:
    """A clock that stands still until it is moved, and never goes back."""

    def __init__(self, start: datetime) -> None:
        self._now = start

    def now(self) -> datetime:
        """Return the moment to which the clock was last moved."""
        return self._now

    def advance(self, to: datetime) -> None:
        """Move to ``to``.

        Raises:
            MonitoringError: ``to`` is in the clock's past.
        """
        if to < self._now:
            raise MonitoringError(
                f"a clock that shows {self._now.isoformat()} cannot go back to {to.isoformat()}",
                fix="start a new session of the monitor to begin again at an earlier time",
            )
        self._now = to
