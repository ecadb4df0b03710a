"""A part of a workflow: exactly what is wanted and what it needs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.config.workflow import Workflow
from mlops_ray.errors import WorkflowError
from mlops_ray.orchestration.graph import Graph, build
from mlops_ray.orchestration.restriction import inputs_of, restrict


def workflow(steps: dict[str, dict[str, Any]]) -> Graph:
    declared = {name: {"uses": "a.b"} | step for name, step in steps.items()}
    return build(Workflow.model_validate({"name": "w", "steps": declared}))


TRAIN = {
    "extract": {"mode": "ensure"},
    "clean": {"with": {"raw": "$extract"}},
    "quiet": {},
    "store": {"with": {"tables": "$clean"}, "mode": "effect", "after": ["quiet"]},
    "data": {"with": {"tables": "$clean", "versions": "$store.versions"}},
    "fit": {"with": {"data": "$data"}, "when": "$quiet", "after": ["store", "quiet"]},
    "score": {"map": {"part": "$data"}, "with": {"model": "$fit"}},
    "other": {"with": {"data": "$data"}},
}


def test_nothing_asked_is_the_whole() -> None:
    graph = workflow(TRAIN)
    assert restrict(graph, ()) is graph


def test_only_what_is_wanted_and_what_it_needs() -> None:
    graph = restrict(workflow(TRAIN), ["score"], ["store", "extract"])
    assert graph.order == ("extract", "clean", "store", "data", "fit", "score")
    assert graph.needs["store"] == graph.after["store"] == frozenset()
    assert graph.step("store").inputs == {}
    assert graph.conditions("fit") == ()
    assert graph.step("fit").when is None
    assert graph.after["fit"] == {"data", "store"}
    assert graph.needs["score"] == {"data", "fit"}


def test_what_lies_behind_a_given_step_is_left_out() -> None:
    graph = restrict(workflow(TRAIN), ["fit"], ["data"])
    assert graph.order == ("data", "fit")


def test_given_steps_alone_leave_the_others_as_they_are() -> None:
    whole = workflow(TRAIN)
    graph = restrict(whole, (), ["data"])
    assert graph.order == whole.order
    assert graph.needs["data"] == frozenset()
    assert graph.step("fit") == whole.step("fit")
    assert graph.conditions("fit") == whole.conditions("fit")


def test_unknown_steps_are_refused() -> None:
    with pytest.raises(WorkflowError, match="no step 'fitt'"):
        restrict(workflow(TRAIN), ["fitt"])


NAMES = "abcdefg"


@given(
    st.dictionaries(st.sampled_from(NAMES), st.sets(st.sampled_from(NAMES), max_size=3)),
    st.sets(st.sampled_from(NAMES), min_size=1, max_size=3),
    st.sets(st.sampled_from(NAMES), max_size=3),
)
def test_the_part_is_what_paths_without_given_steps_lead_to(
    drawn: dict[str, set[str]], only: set[str], facts: set[str]
) -> None:
    inputs = {n: {m for m in drawn.get(n, ()) if m < n} for n in NAMES}
    graph = workflow({n: {"with": {m: f"${m}" for m in sorted(inputs[n])}} for n in NAMES})

    def leads(target: str, wanted: str) -> bool:
        """Say whether ``wanted`` needs ``target`` over steps that are not given."""
        return target == wanted or (
            wanted not in facts and any(leads(target, other) for other in inputs[wanted])
        )

    expected = {n for n in NAMES if any(leads(n, wanted) for wanted in only)}
    part = restrict(graph, only, facts & expected)
    assert set(part.order) == expected
    assert all(inputs_of(part, n) == (set() if n in facts else inputs[n]) for n in part.order)
