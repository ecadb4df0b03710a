"""What may run at once, and in what order."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.orchestration.graph import build
from mlops_ray.orchestration.keys import StepKey
from mlops_ray.orchestration.lanes import Lanes
from mlops_ray.orchestration.work import Work

KEY = StepKey("k", {}, "b")


def work_of(name: str, step: Step, calls: int | None = None) -> Work:
    elements = None if calls is None else [{"x": i} for i in range(calls)]
    return Work(name, step, KEY, b"", elements, [KEY] * (calls or 0))


def test_the_most_urgent_goes_first_then_the_order_of_the_plan() -> None:
    steps: dict[str, dict[str, Any]] = {
        "low": {"uses": "a.b", "priority": -1},
        "first": {"uses": "a.b"},
        "second": {"uses": "a.b"},
        "high": {"uses": "a.b", "priority": 7},
    }
    made = {name: Step.model_validate(step) for name, step in steps.items()}
    graph = build(Workflow(name="w", steps=made, max_parallel=1))
    lanes = Lanes(graph)
    for name in ("low", "second", "first", "high"):
        lanes.add(work_of(name, graph.step(name)))
    order = []
    while started := next(lanes.startable(lambda: 9), None):
        started.waiting.popleft()
        lanes.enter(started)
        order.append(started.name)
        lanes.leave(started)
    assert order == ["high", "first", "second", "low"]


@settings(deadline=None)
@given(
    whole=st.none() | st.integers(1, 6),
    nested=st.none() | st.integers(1, 4),
    mapped=st.none() | st.integers(1, 4),
    capacity=st.integers(4, 8),
    data=st.data(),
)
def test_no_limit_is_ever_exceeded_and_everything_runs(
    whole: int | None, nested: int | None, mapped: int | None, capacity: int, data: st.DataObject
) -> None:
    inner = {
        "steps": {
            "one": {"uses": "a.b"},
            "two": {"uses": "a.b", "group": "g"},
            "three": {"uses": "a.b", "group": "g"},
        },
        "name": "inner",
        "max_parallel": nested,
    }
    steps = {
        "parts": {"uses": "a.b"},
        "many": {"uses": "a.b", "map": {"x": "$parts"}, "max_parallel": mapped},
        "inner": {"workflow": inner},
        "free": {"uses": "a.b"},
    }
    workflow = Workflow.model_validate({"name": "w", "steps": steps, "max_parallel": whole})
    graph = build(workflow)
    lanes = Lanes(graph)
    works = [work_of(n, graph.step(n), 7 if n == "many" else None) for n in graph.order]
    for work in works:
        lanes.add(work)
    running: list[Work] = []
    done: Counter[str] = Counter()
    while running or any(work.waiting for work in works):
        for work in lanes.startable(lambda: capacity):
            work.waiting.popleft()
            lanes.enter(work)
            running.append(work)
        names = Counter(work.name for work in running)
        assert 0 < len(running) <= (whole or capacity)
        assert names["many"] <= (mapped or whole or capacity)
        assert sum(n for name, n in names.items() if name.startswith("inner/")) <= (nested or 9)
        assert names["inner/two"] + names["inner/three"] <= 1
        work = data.draw(st.sampled_from(running))
        running.remove(work)
        lanes.leave(work)
        done[work.name] += 1
        if work.waiting:
            lanes.add(work)
    assert done == {
        "parts": 1,
        "many": 7,
        "inner/one": 1,
        "inner/two": 1,
        "inner/three": 1,
        "free": 1,
    }


def test_a_step_that_was_dropped_can_be_added_anew_though_no_slot_is_free() -> None:
    step = Step.model_validate({"uses": "a.b"})
    graph = build(Workflow(name="w", steps={"one": step, "two": step}, max_parallel=1))
    lanes = Lanes(graph)
    old, new, busy = (work_of(name, step) for name in ("two", "two", "one"))
    lanes.add(old)
    lanes.enter(busy)
    assert not list(lanes.startable(lambda: 9))
    old.waiting.clear()
    lanes.drop(old)
    lanes.add(new)
    lanes.leave(busy)
    assert next(lanes.startable(lambda: 9)) is new
