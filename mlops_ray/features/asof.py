"""The point-in-time join: for each label, the newest row that could be known at its time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def asof_join(
    label_entity: Ints,
    label_us: Ints,
    row_entity: Ints,
    event_us: Ints,
    created_us: Ints,
    *,
    ttl_us: int | None = None,
    known_only: bool = True,
) -> Ints:
    """Return for each label the number of the row to use, −1 where there is none.

    It is the row of the same entity with the newest event time such that event time ≤ label time
    and label time − event time ≤ ``ttl_us``; of several with that event time, the one created last.
    With ``known_only`` only rows with created time ≤ label time take part. Equal rows in all of
    this: the one that comes last. Labels and rows may come in any order; entities are numbers, and
    a negative one matches nothing. Times are µs since 1970.
    """
    order = np.lexsort((created_us, event_us, row_entity))
    entity, event, created = row_entity[order], event_us[order], created_us[order]
    row_key, label_key = _keys(entity, event, label_entity, label_us)
    place = np.searchsorted(row_key, label_key, side="right") - 1
    if known_only:
        _step_back(place, entity, created, label_entity, label_us)
    inside = np.maximum(place, 0)
    if not len(order):
        return np.full(len(label_entity), -1, np.int64)
    found = (place >= 0) & (entity[inside] == label_entity) & (label_entity >= 0)
    if ttl_us is not None:
        found &= label_us - event[inside] <= ttl_us
    return np.where(found, order[inside], -1)


def _step_back(
    place: Ints, entity: Ints, created: Ints, label_entity: Ints, label_us: Ints
) -> None:
    """Move each place to the nearest earlier row of its entity that was created in time."""
    open_ = np.flatnonzero(place >= 0)
    while len(open_):
        at = place[open_]
        unknown = (entity[at] == label_entity[open_]) & (created[at] > label_us[open_])
        open_ = open_[unknown]
        place[open_] -= 1
        open_ = open_[place[open_] >= 0]


def _keys(row_entity: Ints, row_us: Ints, label_entity: Ints, label_us: Ints) -> tuple[Ints, Ints]:
    """Pack (entity, time) into one number that sorts alike, for rows and labels."""
    if not len(row_us) or not len(label_us):
        return np.zeros(len(row_us), np.int64), np.zeros(len(label_us), np.int64)
    low = int(min(row_us.min(), label_us.min()))
    span = int(max(row_us.max(), label_us.max())) - low + 1
    most = int(max(row_entity.max(), label_entity.max())) + 2
    if span * most < 1 << 62:
        return row_entity * span + (row_us - low), label_entity * span + (label_us - low)
    times = np.unique(np.concatenate((row_us, label_us)))
    rank, count = np.searchsorted(times, row_us), len(times)
    return row_entity * count + rank, label_entity * count + np.searchsorted(times, label_us)
