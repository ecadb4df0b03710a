"""The kernel of the point-in-time join: for each label, the newest row known at its time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlops_ray.features.columns import NO_TIME

Ints = NDArray[np.int64]


def asof_join(
    label_run: Ints,
    label_us: Ints,
    bounds: Ints,
    event_us: Ints,
    created_us: Ints,
    *,
    ttl_us: int | None = None,
    known_only: bool = True,
) -> Ints:
    """Return for each label the number of the row to use, −1 where there is none.

    It is the row of the label's run with the newest event time such that event time ≤ label time
    and label time − event time ≤ ``ttl_us``; of several with that event time, the one created last,
    and then the last one. With ``known_only`` only rows with created time ≤ label time take part.
    A null time (``NO_TIME``) matches nothing. Times are µs since 1970.

    Args:
        label_run: int64 [n], which run has the rows of the label's entity; −1 for none.
        label_us: int64 [n], label times, in any order.
        bounds: int64 [r + 1], run i has rows bounds[i] to bounds[i + 1] − 1.
        event_us: int64 [m], event times, within each run sorted by (event time, created time).
        created_us: int64 [m], created times.
        ttl_us: How old a row may be.
        known_only: Whether a row counts only from its created time on.
    """
    place = np.full(len(label_run), -1, np.int64)
    asked = np.flatnonzero((label_run >= 0) & (label_us != NO_TIME))
    if not len(asked) or not len(event_us):
        return place
    run, at_us = label_run[asked], label_us[asked]
    first = bounds[run]
    found = _last_by(event_us, at_us, first, bounds[run + 1])
    if known_only:
        _step_back(found, first, at_us, event_us, created_us, ttl_us)
    fits = found >= first
    inside = np.where(fits, found, 0)
    event = event_us[inside]
    fits &= event != NO_TIME
    if ttl_us is not None:
        fits &= _age(at_us, event) <= np.uint64(ttl_us)
    place[asked] = np.where(fits, found, -1)
    return place


def _last_by(times: Ints, at: Ints, first: Ints, end: Ints) -> Ints:
    """Return the last place in [first, end) whose time is ≤ ``at``, first − 1 for none."""
    low, high = first.copy(), end.copy()
    for _ in range(int((end - first).max()).bit_length()):
        middle = (low + high) >> 1
        # Where low has met high, at the end of the times, any place will do.
        earlier = times.take(middle, mode="clip") <= at
        open_ = low < high
        low = np.where(open_ & earlier, middle + 1, low)
        high = np.where(open_ & ~earlier, middle, high)
    return low - 1


def _step_back(
    place: Ints, first: Ints, at_us: Ints, event_us: Ints, created_us: Ints, ttl_us: int | None
) -> None:
    """Move each place to the nearest earlier row that was created in time, below first for none."""
    open_ = np.flatnonzero(place >= first)
    open_ = open_[created_us[place[open_]] > at_us[open_]]
    if ttl_us is not None and len(open_):
        young = _age(at_us[open_], event_us[place[open_]]) <= np.uint64(ttl_us)
        place[open_[~young]] = -1
        open_ = open_[young]
    if len(open_):
        place[open_] = _previous_by(created_us, at_us[open_], place[open_])


def _previous_by(values: Ints, limit: Ints, place: Ints) -> Ints:
    """Return the nearest place before ``place`` whose value is ≤ its limit, −1 for none.

    Climbs a binary tree of minima over the values, then goes down again: 2 log₂ m steps, whatever
    the values are.
    """
    levels = [values]
    while len(levels[-1]) > 1:
        below = levels[-1]
        even = below[: len(below) // 2 * 2].reshape(-1, 2).min(1)
        levels.append(np.append(even, below[-1]) if len(below) % 2 else even)
    node, height = place.copy(), np.full(len(place), -1)
    climbing = np.arange(len(place))
    for level, minima in enumerate(levels):
        right = node[climbing] & 1 == 1
        left = np.where(right, node[climbing] - 1, 0)
        found = right & (minima[left] <= limit[climbing])
        node[climbing[found]] -= 1
        height[climbing[found]] = level
        climbing = climbing[~found]
        node[climbing] >>= 1
    for level in range(len(levels) - 1, 0, -1):
        down = np.flatnonzero(height >= level)
        right = np.minimum(2 * node[down] + 1, len(levels[level - 1]) - 1)
        fits = levels[level - 1][right] <= limit[down]
        node[down] = np.where(fits, right, 2 * node[down])
    return np.where(height >= 0, node, -1)


def _age(at_us: Ints, event_us: Ints) -> NDArray[np.uint64]:
    """Return at − event where at ≥ event, also where the difference is more than an int64 holds."""
    return at_us.view(np.uint64) - event_us.view(np.uint64)
