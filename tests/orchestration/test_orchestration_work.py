"""The calls of a step: outputs in their order, batches of what is short."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.config.workflow import Step
from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.orchestration.keys import StepKey
from mlops_ray.orchestration.work import Work


def mapped(calls: int, **step: Any) -> Work:
    made = Step.model_validate({"uses": "a.b", "map": {"x": "$y"}} | step)
    keys = [StepKey(str(i), {}, "") for i in range(calls)]
    return Work("s", made, StepKey("k", {}, ""), b"", [{"x": i} for i in range(calls)], keys)


def ref(number: int) -> ArtifactRef:
    return ArtifactRef(digest=str(number), kind="json", size=1)


@settings(deadline=None)
@given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
def test_outputs_are_in_the_order_of_the_list(order: list[int], known: set[int]) -> None:
    work = mapped(6)
    work.known({item: ref(item) for item in known})
    assert set(work.waiting) == set(range(6)) - known
    for item in order:
        if item not in known:
            assert not work.is_over
            work.returned(item, ref(item))
    assert work.is_over
    assert [output.digest for output in work.outputs] == ["0", "1", "2", "3", "4", "5"]
    assert work.progress == "6/6"


def test_nothing_to_map_over_is_over_at_once() -> None:
    work = mapped(0)
    assert work.is_over
    assert work.outputs == []


def test_short_calls_travel_together_and_leave_work_for_everyone() -> None:
    work = mapped(1000)
    assert work.batch(lambda: 8) == 1
    work.took(0.001)
    assert work.batch(lambda: 4) == 50
    assert work.batch(lambda: 100) == 3
    for _ in range(50):
        work.took(1.0)
    assert work.batch(lambda: 8) == 1


@pytest.mark.parametrize(
    "step", [{"timeout": "5s"}, {"group": "g"}, {"mode": "effect", "idempotent": False}]
)
def test_calls_that_need_a_process_or_a_clock_of_their_own_travel_alone(
    step: dict[str, Any],
) -> None:
    work = mapped(1000, **step)
    work.took(0.0001)
    assert work.batch(lambda: 1) == 1


def test_calls_of_a_batch_that_crashed_travel_alone() -> None:
    work = mapped(1000)
    work.took(0.001)
    work.suspects = {0, 5}
    assert work.batch(lambda: 4) == 1
    work.waiting.popleft()
    assert work.batch(lambda: 4) == 4
