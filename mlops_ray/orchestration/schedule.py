"""Cron in time zones: the instants at which a schedule occurs, also where clocks change."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim

from mlops_ray.config.triggers import ALIASES

_DAY = timedelta(days=1)
_SECOND = timedelta(seconds=1)
_FAR = timedelta(days=366 * 50)


def occurrences(cron: str, timezone: str, after: datetime, until: datetime) -> list[datetime]:
    """Return the instants in (after, until] at which a schedule occurs, in UTC, ascending.

    Where both the minute and the hour are fixed, that is, neither begins with ``*``, a local time
    that a change of clocks leaves out occurs at the end of the gap, and one that comes twice occurs
    the first time only. Otherwise what is left out does not occur, and what comes twice does twice.

    Args:
        cron: Five fields as Debian's cron reads them, or an alias such as ``@daily``.
        timezone: Name of an IANA time zone.
        after: Aware; not itself an occurrence.
        until: Aware; itself an occurrence if it fits.
    """
    zone = ZoneInfo(timezone)
    expression = ALIASES.get(cron.strip().lower(), cron)
    minute, hour = expression.split()[:2]
    fixed = not minute.startswith("*") and not hour.startswith("*")
    # No clock was ever changed by more than a day.
    end = _wall(until, zone) + _DAY
    found: set[datetime] = set()
    for wall in CronSim(expression, _wall(after, zone) - _DAY):
        if wall > end:
            break
        found |= {moment for moment in _instants(wall, zone, fixed) if after < moment <= until}
    return sorted(found)


def next_occurrence(cron: str, timezone: str, after: datetime) -> datetime | None:
    """Return the first instant after ``after`` at which a schedule occurs; None in 50 years."""
    span, far = _DAY, after + _FAR
    while after < far:
        found = occurrences(cron, timezone, after, after + span)
        if found:
            return found[0]
        after, span = after + span, span * 8
    return None


def newest_occurrences(
    cron: str, timezone: str, after: datetime, until: datetime, most: int
) -> list[datetime]:
    """Return the last ``most`` of ``occurrences``, ascending; quick also over a long time."""
    found: list[datetime] = []
    span = _DAY
    while len(found) < most and until > after:
        start = max(after, until - span)
        found = occurrences(cron, timezone, start, until) + found
        until, span = start, span * 8
    return found[-most:]


def _wall(moment: datetime, zone: ZoneInfo) -> datetime:
    return moment.astimezone(zone).replace(tzinfo=None)


def _instants(wall: datetime, zone: ZoneInfo, fixed: bool) -> Iterator[datetime]:
    """Yield when clocks in the zone show a time, or what counts in its place."""
    first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if first > second:  # a gap: the clocks went from before it to after it
        if fixed:
            yield _change(second, first, zone)
        return
    yield first
    if second != first and not fixed:
        yield second


def _change(before: datetime, after: datetime, zone: ZoneInfo) -> datetime:
    """Return the instant in (before, after] at which the zone's offset changes."""
    old = before.astimezone(zone).utcoffset()
    while after - before > _SECOND:
        middle = before + (after - before) / 2
        middle = middle.replace(microsecond=0)
        if middle.astimezone(zone).utcoffset() == old:
            before = middle
        else:
            after = middle
    return after
