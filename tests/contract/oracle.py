"""What a feature store must answer, in plain Python over dicts: slow, and plain to see.

Times are whole µs since 1970. A row is a dict of keys, ``event``, ``created`` and features; rows are
listed in the order in which they were written. A float NaN is a value; None is a null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

PRESENT, NULL, NOT_FOUND, EXPIRED = "present", "null", "not found", "expired"


def same_key(one: Row, other: Row, keys: Sequence[str]) -> bool:
    """Equal values of equal types; a null equals nothing."""
    return all(
        one[key] is not None and type(one[key]) is type(other[key]) and one[key] == other[key]
        for key in keys
    )


def as_of(
    label: Row, rows: Sequence[Row], keys: Sequence[str], ttl: int | None, known_only: bool
) -> Row | None:
    """The row that a label at ``label["at"]`` sees."""
    best: Row | None = None
    for row in rows:
        if not same_key(label, row, keys):
            continue
        age = label["at"] - row["event"]
        if age < 0 or (ttl is not None and age > ttl):
            continue
        if known_only and row["created"] > label["at"]:
            continue
        if best is None or (row["event"], row["created"]) >= (best["event"], best["created"]):
            best = row
    return best


def join(
    labels: Sequence[Row],
    rows: Sequence[Row],
    keys: Sequence[str],
    names: Sequence[str],
    ttl: int | None = None,
    known_only: bool = True,
) -> list[dict[str, Any]]:
    """One dict of features for each label, in the labels' order; None where there is nothing."""
    found = [as_of(label, rows, keys, ttl, known_only) for label in labels]
    return [{name: None if row is None else row[name] for name in names} for row in found]


def newest(key: Row, rows: Sequence[Row], keys: Sequence[str]) -> Row | None:
    """The row that an online store keeps of an entity."""
    best: Row | None = None
    for row in rows:
        newer = best is None or (row["event"], row["created"]) >= (best["event"], best["created"])
        if same_key(key, row, keys) and newer:
            best = row
    return best


def look_up(
    key: Row, rows: Sequence[Row], keys: Sequence[str], names: Sequence[str], ttl: int | None
) -> dict[str, tuple[Any, str]]:
    """What an online store says at ``key["at"]``: (value, status) of each feature."""
    row = newest(key, rows, keys)
    if row is None or max(row["event"], row["created"]) > key["at"]:
        return dict.fromkeys(names, (None, NOT_FOUND))
    if ttl is not None and key["at"] - row["event"] > ttl:
        return dict.fromkeys(names, (None, EXPIRED))
    return {name: (row[name], NULL if row[name] is None else PRESENT) for name in names}
