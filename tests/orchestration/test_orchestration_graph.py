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


INNER = {
    "name": "inner",
    "inputs": {"day": None, "size": 3},
    "outputs": {"table": "$clean", "count": "$clean.count", "day": "$inputs.day"},
    "max_parallel": 2,
    "steps": {
        "load": {"uses": "mlops_ray.x.y", "with": {"day": "$inputs.day", "n": "$inputs.size"}},
        "clean": {
            "uses": "mlops_ray.x.y",
            "with": {"raw": ["$load", "$inputs.day.name"]},
            "when": "$load.rows > 0",
            "priority": 1,
            "group": "g",
        },
    },
}


def nested(**changes: object) -> Workflow:
    outer = {"workflow": INNER, "with": {"day": "$first.day"}} | changes
    return Workflow.model_validate(
        {
            "name": "w",
            "outputs": {"table": "$outer.table"},
            "max_parallel": 5,
            "steps": {
                "first": {"uses": "mlops_ray.x.y"},
                "outer": outer,
                "last": {
                    "uses": "mlops_ray.x.y",
                    "with": {"t": "$outer.table", "c": "$outer.count", "d": "$outer.day.0"},
                    "after": ["outer"],
                },
            },
        }
    )


def test_nested_steps_get_the_name_of_the_outer_and_the_inputs_put_in() -> None:
    graph = build(nested())
    assert graph.order == ("first", "outer/load", "outer/clean", "last")
    assert graph.step("outer/load").inputs == {"day": "$first.day", "n": 3}
    assert graph.step("outer/clean").inputs == {"raw": ["$outer/load", "$first.day.name"]}
    assert graph.step("outer/clean").group == "outer/g"
    assert graph.step("last").inputs == {
        "t": "$outer/clean",
        "c": "$outer/clean.count",
        "d": "$first.day.0",
    }
    assert graph.after["last"] == {"outer/load", "outer/clean", "first"}
    assert graph.outputs == {"table": "$outer/clean"}
    assert graph.limits == {"": 5, "outer": 2}
    assert graph.scopes("outer/clean") == ("", "outer")


def test_conditions_priority_and_order_of_the_outer_step_hold_for_the_inner_ones() -> None:
    graph = build(nested(when="not $first.quiet", priority=10, after=["first"]))
    assert [str(c) for c in graph.conditions("outer/clean")] == [
        "not $first.quiet",
        "$outer/load.rows > 0",
    ]
    assert graph.needs["outer/clean"] == {"first", "outer/load"}
    assert graph.step("outer/clean").priority == 11
    graph = build(nested(after=["first"], **{"with": {"day": {"name": 1, "0": 2}}}))
    assert graph.needs["outer/load"] == frozenset()
    assert graph.after["outer/load"] == {"first"}


def test_workflows_nest_to_any_depth_and_may_pass_through() -> None:
    middle = {
        "name": "middle",
        "inputs": {"day": None},
        "outputs": {"table": "$deep.table", "day": "$deep.day"},
        "steps": {"deep": {"workflow": INNER, "with": {"day": "$inputs.day"}}},
    }
    graph = build(
        Workflow.model_validate(
            {
                "name": "w",
                "steps": {
                    "outer": {"workflow": middle, "with": {"day": {"name": "monday"}}},
                    "last": {
                        "uses": "mlops_ray.x.y",
                        "with": {"t": "$outer.table", "d": "$outer.day"},
                    },
                },
            }
        )
    )
    assert graph.order == ("outer/deep/load", "outer/deep/clean", "last")
    assert graph.step("last").inputs == {"t": "$outer/deep/clean", "d": {"name": "monday"}}
    assert graph.scopes("outer/deep/load") == ("", "outer", "outer/deep")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"with": {}}, "the workflow needs input 'day'"),
        ({"with": {"day": 1, "dya": 1}}, "no such input. Did you mean day?"),
        ({"with": {"day": "$outer.table"}}, "cycle"),
        ({"with": {"day": "$outer.day"}}, "is given to itself"),
        ({"retries": 2}, "is for functions"),
        ({"with": {"day": "$outer"}}, "has outputs by name"),
        ({"with": {"day": {"no": "name"}}}, "has no part 'name'"),
    ],
)
def test_what_is_wrong_with_a_nested_workflow_is_said(
    changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(nested(**changes))


def test_an_unknown_output_of_a_nested_workflow_is_named_with_the_closest() -> None:
    steps = {
        "outer": {"workflow": INNER, "with": {"day": 1}},
        "last": {"uses": "mlops_ray.x.y", "with": {"t": "$outer.tabel"}},
    }
    with pytest.raises(ConfigError) as caught:
        build(Workflow.model_validate({"name": "w", "steps": steps}))
    assert "workflow.steps.last.with.t" in str(caught.value)
    assert "Did you mean $outer.table?" in str(caught.value)


def test_references_select_parts_and_leave_other_text_alone() -> None:
    assert references.parse("$a.b.0") == references.Reference("a", ("b", "0"))
    assert references.parse("$5 a day") is None
    assert references.Reference("a", ("b", "0")).select({"b": [7]}) == 7
    with pytest.raises(KeyError):
        references.Reference("a", ("c",)).select({"b": 1})


@pytest.mark.parametrize("text", ["$lod-data", "$first[0]", "$first.val-loss", "$first/da ta"])
def test_what_begins_like_a_reference_and_is_none_is_a_problem(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a reference") as caught:
        build(workflow(first={}, second={"with": {"x": {"deep": [text]}}}))
    assert f"${text}" in str(caught.value)
    assert build(workflow(first={}, second={"with": {"x": f"${text}", "y": "$5"}}))


def test_defaults_of_inputs_and_outputs_are_references_or_plain_too() -> None:
    values = {"name": "w", "steps": {"first": {"uses": "a.b.c"}}}
    for more in ({"inputs": {"x": ["$a-b"]}}, {"outputs": {"x": "$first.a-b"}}):
        with pytest.raises(ConfigError, match="is not a reference"):
            build(Workflow.model_validate(values | more))


def test_a_reference_inside_a_given_dict_is_one_for_parts_and_conditions() -> None:
    step = {"uses": "a.b.c", "when": "$inputs.c.go == false", "with": {"x": "$inputs.c.go.deep"}}
    inner = {"name": "n", "inputs": {"c": None}, "steps": {"s": step}}
    nested_in = {"workflow": inner, "with": {"c": {"go": "$gate.passed"}}}
    steps = {"gate": {"uses": "a.b.c"}, "n": nested_in}
    graph = build(Workflow.model_validate({"name": "w", "steps": steps}))
    assert graph.step("n/s").inputs == {"x": "$gate.passed.deep"}
    assert [str(condition) for condition in graph.conditions("n/s")] == ["$gate.passed == false"]
    assert graph.needs["n/s"] == {"gate"}


def test_a_digit_that_is_no_number_selects_nothing() -> None:
    with pytest.raises(KeyError):
        references.select([1], ("²",))
