"""The body of feedback: labels by prediction id."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mlops_ray.errors import RequestError
from mlops_ray.serving.formats.instants import instant, micros
from mlops_ray.serving.formats.json_body import check_id, decode
from mlops_ray.serving.formats.refusal import refusal, refuse_unknown

_DAY_US = 86_400_000_000
_KEYS = ("id", "label", "known_at")


@dataclass(frozen=True, slots=True)
class Feedback:
    """Labels (0 or 1) by prediction id; ``known_at_us`` is in µs since 1970 UTC."""

    ids: list[str]
    labels: list[int]
    known_at_us: list[int]

    @property
    def rows(self) -> int:
        """How many labels there are."""
        return len(self.ids)


def parse_feedback(body: bytes, max_rows: int, now: datetime) -> Feedback:
    """Return the labels of a body like ``{"labels": [{"id": "a", "label": 1, "known_at": "…"}]}``.

    ``known_at`` may be left out: the label is then known ``now``. It may be a day after that, as
    clocks differ; later ones are refused.

    Raises:
        RequestError: as for ``RequestSchema.parse``.
    """
    content, flaw = decode(body)
    if not isinstance(content, dict) or set(content) != {"labels"}:
        raise RequestError('the body must be {"labels": [{"id": …, "label": …}]}', field="labels")
    rows = content["labels"]
    if type(rows) is not list or not rows:
        raise refusal("must be a list of at least one label", "labels")
    if len(rows) > max_rows:
        text = f"holds {len(rows)} labels; a request may have {max_rows}"
        raise refusal(text, "labels", status=413)
    feedback = Feedback([], [], [])
    now_us = micros(now)
    for index, row in enumerate(rows):
        if type(row) is not dict:
            raise refusal("must hold an object for each label", "labels", index)
        for name in row:
            if name not in _KEYS:
                refuse_unknown(name, _KEYS, "field", index)
        feedback.ids.append(check_id(row.get("id"), "id", index))
        feedback.labels.append(_label(row.get("label"), index))
        feedback.known_at_us.append(_known_at(row.get("known_at"), now_us, index))
    if flaw is not None:
        raise flaw
    return feedback


def _label(value: Any, row: int) -> int:
    if type(value) in (int, bool) and value in (0, 1):
        return int(value)
    raise refusal("must be 0 or 1", "label", row)


def _known_at(value: Any, now_us: int, row: int) -> int:
    if value is None:
        return now_us
    known_at_us = instant(value, "known_at", row)
    if known_at_us > now_us + _DAY_US:
        raise refusal("must not be in the future", "known_at", row)
    return known_at_us
