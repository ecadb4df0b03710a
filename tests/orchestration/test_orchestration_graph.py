"""The graph: order, references, and what is wrong with it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.errors import ConfigError
from mlops_ray.orchestration import references
from mlops_ray.orchestration.graph import build


def workflow(**steps: dict[str, object]) -> Workflow:
    made = {n: Step.model_validate({"uses": "mlops_ray.x.y"} | s) for n, s in steps.items()}
    return Workflow(name="w", steps=made)


def test_order_follows_from_references_conditions_and_after() -> None:
    graph = build(
        workflow(
            last={"after": ["third"]},
            third={"when": "$second.ok"},
            second={"with": {"x": {"deep": ["$first"]}}},
            first={},
        )
    )
    assert graph.order == ("first", "second", "third", "last")
    assert graph.needs["third"] == {"second"}
    assert graph.needs["last"] == frozenset()


def test_all_unknown_references_are_reported_with_the_closest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        build(workflow(train={}, judge={"with": {"m": "$trian"}}, serve={"after": ["nothing"]}))
    assert len(caught.value.problems) == 2
    assert "Did you mean $train?" in str(caught.value)


def test_a_cycle_is_named() -> None:
    with pytest.raises(ConfigError, match="cycle"):
        build(workflow(a={"with": {"x": "$b"}}, b={"with": {"x": "$a"}}))


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_any_acyclic_workflow_is_ordered(size: int, random: object) -> None:
    steps = {
        f"s{i}": {"with": {"x": [f"$s{j}" for j in range(i) if random.random() < 0.4]}}  # type: ignore[attr-defined]
        for i in range(size)
    }
    names = list(steps)
    random.shuffle(names)  # type: ignore[attr-defined]
    order = build(workflow(**{name: steps[name] for name in names})).order
    position = {name: index for index, name in enumerate(order)}
    for name, step in steps.items():
        assert all(position[ref[1:]] < position[name] for ref in step["with"]["x"])


def test_references_select_parts_and_leave_other_text_alone() -> None:
    assert references.parse("$a.b.0") == references.Reference("a", ("b", "0"))
    assert references.parse("$5 a day") is None
    assert references.Reference("a", ("b", "0")).select({"b": [7]}) == 7
    with pytest.raises(KeyError):
        references.Reference("a", ("c",)).select({"b": 1})
