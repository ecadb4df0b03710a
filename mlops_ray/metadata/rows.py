"""Records as rows of the ledger's tables and back: pure, and made for many at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from mlops_ray.config.base import Frozen
from mlops_ray.metadata.records import Link, NewEvent, NewKey, StepChange, StepRecord, Write

_JSON = frozenset({"config", "provenance", "metrics", "params", "data", "output", "parts"})
_to_json = json.JSONEncoder(default=str).encode
_IDENTITY = ("run_id", "name", "item")
_CHANGEABLE = frozenset(StepRecord.model_fields) - frozenset(_IDENTITY)


class Batch(NamedTuple):
    """Rows of one table that all set the same columns."""

    table: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]


def batches(writes: Iterable[Write]) -> list[Batch]:
    """Turn writes into as few statements as give the same result as one by one, in order.

    Changes of the same step become one. Steps are sorted, so that transactions that meet lock
    them in the same order; events come last and keep theirs.

    Raises:
        ValueError: A change names something that a step has not.
    """
    steps: dict[tuple[str, str, int], dict[str, Any]] = {}
    rows: dict[type, list[dict[str, Any]]] = {NewKey: [], Link: [], NewEvent: []}
    for write in writes:
        if isinstance(write, StepChange):
            identity = (write.run_id, write.name, write.item)
            steps.setdefault(identity, {}).update(write.values)
        else:
            rows[type(write)].append(encode(write))
    made = _step_batches(steps)
    for kind, table in ((NewKey, "keys"), (Link, "links"), (NewEvent, "events")):
        if rows[kind]:
            made.append(Batch(table, tuple(rows[kind][0]), rows[kind]))
    return made


def _step_batches(steps: dict[tuple[str, str, int], dict[str, Any]]) -> list[Batch]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for identity in sorted(steps):
        values = steps[identity]
        row = dict(zip(_IDENTITY, identity, strict=True))
        row.update((name, cell(value)) for name, value in values.items())
        groups.setdefault(tuple(sorted(values)), []).append(row)
    for columns in groups:
        if unknown := set(columns) - _CHANGEABLE:
            raise ValueError(f"a step has no {', '.join(sorted(unknown))}")
    return [Batch("steps", columns, rows) for columns, rows in groups.items()]


def now() -> str:
    """Return this moment as ISO 8601 in UTC, to the microsecond; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def cell(value: Any) -> Any:
    """Return a value as a column holds it: JSON for what has parts, ISO 8601 for moments."""
    if isinstance(value, str):
        return value if value.isascii() and "\0" not in value else _storable(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return moment.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, Frozen):
        return value.model_dump_json()
    return _to_json(value)


def _storable(text: str) -> str:
    # PostgreSQL refuses NUL in text; neither database takes half of a surrogate pair.
    return text.replace("\0", "�").encode("utf-8", "replace").decode()


def encode(record: Frozen) -> dict[str, Any]:
    """Return a record as a row."""
    return {name: cell(value) for name, value in record.__dict__.items()}


def decode(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the fields of its record."""
    return {
        name: json.loads(value) if name in _JSON and isinstance(value, str) else value
        for name, value in row.items()
    }
