"""Workflows declared in Python: the same model and checks as in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from orchestration import declared_steps as steps

import mlops_ray
from mlops_ray.config.workflow import Workflow
from mlops_ray.errors import ConfigError, MlopsRayError
from mlops_ray.orchestration.declare import declared_by, workflow

STEPS = "orchestration.declared_steps"


def nightly() -> Any:
    with workflow("nightly", description="d", max_parallel=4) as made:
        table = made.step("load", steps.load, path="orders.csv", timeout="5m")
        model = made.step("fit", steps.fit, data=table.rows, retries=2, after=["load"])
        made.step(
            "score",
            steps.score,
            {"mode": "quick"},
            map={"part": table.parts},
            when=f"{model.auc} >= 0.7",
            mode="effect",
        )
        made.outputs(model=model)
    return made


def test_it_makes_the_same_model_as_yaml() -> None:
    assert nightly().workflow == Workflow.model_validate(
        {
            "name": "nightly",
            "description": "d",
            "max_parallel": 4,
            "outputs": {"model": "$fit"},
            "steps": {
                "load": {"uses": f"{STEPS}.load", "with": {"path": "orders.csv"}, "timeout": "5m"},
                "fit": {
                    "uses": f"{STEPS}.fit",
                    "with": {"data": "$load.rows"},
                    "retries": 2,
                    "after": ["load"],
                },
                "score": {
                    "uses": f"{STEPS}.score",
                    "with": {"mode": "quick"},
                    "map": {"part": "$load.parts"},
                    "when": "$fit.auc >= 0.7",
                    "mode": "effect",
                },
            },
        }
    )


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if text in line and "line_of" not in line)


def test_problems_come_together_each_with_the_line_that_declares_it() -> None:
    made = workflow("broken")
    table = made.step("load", steps.load, path=3)  # first mistake
    made.step("fit", steps.fit, data=table.rowz)  # second mistake
    made.step("score", steps.score, prat=1, part=1, mode="effect")  # third mistake
    with pytest.raises(ConfigError) as caught, made:
        pass
    found = {problem.line: str(problem) for problem in caught.value.problems}
    assert set(found) == {line_of(f"# {n} mistake") for n in ("first", "second", "third")}
    assert all(Path(__file__).name in text for text in found.values())
    assert "Did you mean $load.rows?" in found[line_of("# second mistake")]
    assert "Did you mean part?" in found[line_of("# third mistake")]


@pytest.mark.parametrize(
    ("uses", "expected"), [(lambda: 1, "cannot be a step's function"), (3, "cannot be a step's")]
)
def test_only_functions_that_workers_can_import_are_steps(uses: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected), workflow("w") as made:
        made.step("one", uses)


def test_wrong_options_and_doubled_steps_are_said() -> None:
    with pytest.raises(ConfigError, match="mode"), workflow("w") as made:
        made.step("load", steps.load, path="a", mode="fast")
    made = workflow("w")
    made.step("load", steps.load, path="a")
    made.step("load", steps.load, path="b")
    with pytest.raises(ConfigError, match="already"):
        _ = made.workflow


def test_an_output_is_not_a_list_yet() -> None:
    with pytest.raises(TypeError, match="map="), workflow("w") as made:
        list(made.step("load", steps.load, path="a").parts)


def test_workflows_nest_and_their_lines_stay() -> None:
    with workflow("inner") as inner:
        path = inner.input("path")
        inner.outputs(table=inner.step("load", steps.load, path=path))
    with workflow("outer") as outer:
        made = outer.step("prepare", inner, path="a.csv")
        outer.step("fit", steps.fit, data=made.table.rows, mode="effect")
    nested = outer.workflow.steps["prepare"].workflow
    assert nested is not None
    assert nested.inputs == {"path": None}
    with pytest.raises(ConfigError) as caught, workflow("wrong") as wrong:
        wrong.step("prepare", inner, path=1)
    (problem,) = caught.value.problems
    assert problem.line == line_of('inner.step("load", steps.load, path=path)')


def test_models_and_paths_are_given_as_their_json() -> None:
    with workflow("w") as made:
        made.step("load", steps.load, path=Path("/a"), mode="effect")
    assert made.workflow.steps["load"].inputs == {"path": "/a"}


def test_the_public_names_are_the_doors() -> None:
    assert mlops_ray.workflow is workflow
    assert mlops_ray.effect(steps.load) is steps.load


def test_a_dotted_name_may_declare_the_workflow_of_a_configuration() -> None:
    values, origins = declared_by(f"{STEPS}.nightly", {})
    assert Workflow.model_validate(values).steps["load"].inputs == {"path": "a.csv"}
    assert origins["workflow.steps.load"][0].endswith("declared_steps.py")
    values, _ = declared_by(f"{STEPS}.of_config", {"seed": 7})
    assert values["steps"]["load"]["with"] == {"path": "7.csv"}
    with pytest.raises(MlopsRayError, match="declares no workflow"):
        declared_by(f"{STEPS}.NOTHING", {})


def test_an_output_has_no_truth_yet() -> None:
    with workflow("w") as made:
        table = made.step("load", steps.load, path="a.csv")
        with pytest.raises(TypeError, match="not known yet"):
            bool(table.passed)
