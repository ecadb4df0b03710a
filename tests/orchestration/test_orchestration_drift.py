"""Whether somebody changed something, or a step before only gave something else."""

from __future__ import annotations

from typing import Any

import pytest

from mlops_ray.metadata.records import StepRecord
from mlops_ray.orchestration.drift import Drift
from mlops_ray.orchestration.keys import StepKey


class Parts:
    """What is known of keys of before."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known

    def key_parts(self, key: str) -> dict[str, Any] | None:
        return self.known.get(key)


def parts(code: str = "c", **inputs: Any) -> dict[str, Any]:
    return {"target": "a.b", "code": {"b": code}, "environment": {}, "inputs": inputs}


def fed(digest: str, step: str = "first") -> dict[str, Any]:
    return {"step": step, "digest": digest}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (parts(), parts(x=fed("old")), True),
        (parts(), parts(x=fed("new")), True),
        (parts("other"), parts(x=fed("new")), False),
        (parts(n={"config": 2}), parts(x=fed("new")), False),
        (parts(), parts("other", x=fed("new")), False),
        (parts(), parts(x=fed("new"), y={"config": 1}), False),
        (parts(), parts(x=fed("new", "second")), False),
    ],
)
def test_only_what_steps_gave_is_not_somebodys_doing(
    first: dict[str, Any], second: dict[str, Any], expected: bool
) -> None:
    before = {"first": parts(), "last": parts(x=fed("old"))}
    earlier = {
        name: StepRecord(run_id="r", name=name, position=0, status="succeeded", key=f"{name} 1")
        for name in before
    }
    known = Parts({f"{name} 1": part for name, part in before.items()})
    drift = Drift(known, earlier)  # type: ignore[arg-type]
    for name, now in (("first", first), ("last", second)):
        key = f"{name} {1 if now == before[name] else 2}"
        drift.note(name, StepKey(key, now, "base"))
    assert drift.is_unasked("last") is expected
