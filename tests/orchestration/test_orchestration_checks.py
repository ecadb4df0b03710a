"""Static checks: what is found before anything runs, and what raises no false alarm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from orchestration.packages import package
from pydantic import ValidationError

from mlops_ray.config.check import Findings
from mlops_ray.config.workflow import Step, Workflow
from mlops_ray.orchestration.checks import check_workflow

NAME = "checked_project"
STEPS = """
from __future__ import annotations
import dataclasses
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, TypedDict
import pyarrow as pa
import requests
from typing import Annotated
from pydantic import BaseModel, BeforeValidator, Field
import mlops_ray
from . import door
from mlops_ray.orchestration.marks import ensure
from mlops_ray.metadata import types as ours
from .shapes import Report, Base as Root

class Better(Report):
    extra: int = 0

class Renamed(BaseModel):
    value: int = Field(alias="other")

class Pair(NamedTuple):
    left: int
    right: str

class Row(TypedDict):
    a: int

class Wide(BaseModel):
    x: int
    y: int

class Narrow(BaseModel):
    x: int
    z: int = 0

@dataclasses.dataclass
class Point:
    x: float

def table() -> pa.Table: ...
def path() -> Path: ...
def report() -> Report: ...
def better() -> Better: ...
def maybe() -> Report | None: ...
def optional() -> Optional[Report]: ...
def renamed() -> Renamed: ...
def pair() -> Pair: ...
def row() -> Row: ...
def point() -> Point: ...
def number() -> int: ...
def nothing() -> None: ...
def both() -> tuple[pa.Table, Report]: ...
def wide() -> Wide: ...
def narrow() -> Narrow: ...
def take_wide(x: Wide) -> int: ...
def take_narrow(x: Narrow) -> int: ...
async def later() -> int: ...
def ratio() -> float: ...
def text() -> "str": ...
def numbers() -> list[int]: ...
def texts() -> list[str]: ...
def tables() -> tuple[pa.Table, ...]: ...
def mapping() -> dict[str, int]: ...
def anything() -> Any: ...
def silent(): ...
def mode() -> Literal["full", "quick"]: ...
def shown() -> door.Shown: ...
def aliased() -> door.Number: ...
def gate() -> ours.GateDecision: ...

def take_table(x: pa.Table) -> int: ...
def take_path(x: Path) -> int: ...
def take_report(x: Report) -> int: ...
def take_root(x: Root) -> int: ...
def take_maybe(x: Report | None) -> int: ...
def take_point(x: Point) -> int: ...
def take_int(x: int) -> int: ...
def take_float(x: float) -> int: ...
def take_str(x: str) -> int: ...
def take_numbers(x: list[int]) -> int: ...
def take_texts(x: list[str]) -> int: ...
def take_sequence(x: tuple[float, ...]) -> int: ...
def take_mapping(x: dict[str, float]) -> int: ...
def take_any(x: Any) -> int: ...
def take_silent(x) -> int: ...
def take_mode(x: Literal["full", "none"]) -> int: ...
def take_either(x: int | pa.Table) -> int: ...
def take_moment(x: datetime) -> int: ...
def take_optional(x: Optional[int] = None) -> int: ...
def take_shown(x: door.Shown) -> int: ...
def take_refined(x: Annotated[int, BeforeValidator(len)]) -> int: ...
def take_gate(x: ours.GateDecision) -> int: ...

@mlops_ray.effect
def send(x: int = 1) -> int: ...
@ensure
def serve(x: int = 1) -> int: ...
def shell(x: int = 1) -> int:
    subprocess.run(["ls"])
    return 1
def post(x: int = 1) -> int:
    import requests as http
    http.post("http://x")
    return 1
def mail(server: Any = None) -> int:
    server.send_message("hello")
    return 1
def get(x: int = 1) -> int:
    requests.get("http://x")
    return 1
"""
SHAPES = """
from pydantic import BaseModel

class Base(BaseModel):
    auc: float
    name: str
    parts: list[int] = []

class Report(Base):
    passed: bool = True
    inner: "Inner | None" = None

class Inner(BaseModel):
    rows: int
"""


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    door = "from .shapes import Report as Shown\nNumber = int\n"
    files = {"steps.py": STEPS, "shapes.py": SHAPES, "door.py": door}
    with package(tmp_path_factory.mktemp("checked"), NAME, files) as root:
        yield root


def check(outputs: dict[str, str] | None = None, **steps: dict[str, Any]) -> Findings:
    made = {
        name: {"uses": f"{NAME}.steps.{step.pop('uses', name)}", **step}
        for name, step in ((name, dict(step)) for name, step in steps.items())
    }
    values = {"name": "w", "steps": made, "outputs": outputs or {}}
    found = check_workflow(Workflow.model_validate(values), ["mlops_ray", NAME])
    assert NAME not in sys.modules, "no user code may run"
    return found


def problems(outputs: dict[str, str] | None = None, **steps: dict[str, Any]) -> str:
    return "\n".join(map(str, check(outputs, **steps).problems))


def warnings(outputs: dict[str, str] | None = None, **steps: dict[str, Any]) -> str:
    return "\n".join(map(str, check(outputs, **steps).warnings))


def edge(given: str, taken: str, **more: Any) -> dict[str, dict[str, Any]]:
    """Return a producer, and a consumer of mode effect."""
    consumer = {"uses": f"take_{taken}", "with": {"x": "$given"}, "mode": "effect"}
    return {"given": {"uses": given}, "taken": consumer | more}


FITS = """
table table; path path; report report; better report; better root; report root; maybe maybe;
optional maybe; report maybe; point point; number int; number float; ratio float; text str;
numbers numbers; numbers sequence; texts texts; mapping mapping; anything table; anything int;
silent table; silent int; table any; report silent; mode mode; mode str; text mode;
number either; table either; text moment; text path; mapping report; report mapping; row point;
mapping point; number optional; gate gate; pair any; shown report; report shown; better shown;
aliased int; text refined; numbers refined; row mapping; tables silent; anything gate;
silent gate
"""
NEVER = """
table path; table int; table report; path table; path str; report table; report int;
number table; number str; text int; text float; numbers int; numbers texts;
texts numbers; number numbers; mapping numbers; numbers mapping; report point; text either;
path either; tables numbers; number path; report numbers; mapping table; gate report;
report gate; shown gate; aliased table; number gate; ratio mode
"""


def pairs(text: str) -> list[tuple[str, str]]:
    found = [tuple(word.split()) for word in text.replace("\n", ";").split(";") if word.strip()]
    return [(one, other) for one, other in found]


@pytest.mark.parametrize(("given", "taken"), pairs(FITS))
def test_what_fits_raises_no_alarm(given: str, taken: str) -> None:
    found = check(**edge(given, taken))
    assert not found.problems
    assert not found.warnings


@pytest.mark.parametrize(("given", "taken"), pairs(NEVER))
def test_what_never_fits_is_a_problem(given: str, taken: str) -> None:
    found = problems(**edge(given, taken))
    assert "workflow.steps.taken.with.x: $given is " in found
    assert f"{NAME}.steps.take_{taken} takes " in found


def test_what_may_not_fit_is_a_warning_unless_a_condition_rules_it_out() -> None:
    assert "Report | None" in warnings(**edge("maybe", "report"))
    assert not warnings(**edge("maybe", "report", when="$given"))


@pytest.mark.parametrize(
    ("uses", "part", "hint"),
    [
        ("report", "acu", "Did you mean $given.auc?"),
        ("report", "passd", "Did you mean $given.passed?"),
        ("shown", "acu", "Did you mean $given.auc?"),
        ("better", "extar", "Did you mean $given.extra?"),
        ("report", "inner.rowz", "Did you mean $given.inner.rows?"),
        ("maybe", "pass", "Did you mean $given.passed?"),
        ("pair", "lefd", "Did you mean $given.left?"),
        ("row", "b", "It has: a."),
        ("point", "y", "It has: x."),
        ("gate", "pased", "Did you mean $given.passed?"),
        ("table", "rows", "Table has no part 'rows'"),
        ("number", "x", "int has no part 'x'"),
        ("numbers", "first", "list[int] has no part 'first'"),
    ],
)
def test_an_unknown_part_of_an_output_is_found(uses: str, part: str, hint: str) -> None:
    given = {"given": {"uses": uses}}
    taken = {"uses": "take_any", "mode": "effect"}
    assert hint in problems(**given, taken=taken | {"with": {"x": [{"y": f"$given.{part}"}]}})
    assert hint in problems(**given, taken=taken | {"with": {"x": 1}, "when": f"$given.{part}"})


@pytest.mark.parametrize(
    ("uses", "part"),
    [
        ("report", "parts.0"),
        ("report", "inner.rows"),
        ("mapping", "whatever"),
        ("anything", "a.b"),
        ("silent", "a"),
        ("renamed", "other"),
        ("numbers", "3"),
        ("pair", "left"),
        ("gate", "evidence"),
    ],
)
def test_known_and_unknowable_parts_raise_no_alarm(uses: str, part: str) -> None:
    steps = edge(uses, "any")
    steps["taken"]["with"] = {"x": f"$given.{part}"}
    assert not problems(**steps)


def test_the_type_of_a_part_counts() -> None:
    steps = edge("report", "int")
    steps["taken"]["with"] = {"x": "$given.name"}
    assert "$given.name is str" in problems(**steps)


@pytest.mark.parametrize(
    ("uses", "value", "expected"),
    [
        ("take_int", "many", "Got 'many', expected int"),
        ("take_int", 1.5, "expected int"),
        ("take_numbers", [1, "x"], "with.x.1"),
        ("take_mode", "quick", "expected Literal['full', 'none']"),
        ("take_str", 3, "expected str"),
        ("take_optional", "x", "expected int | None"),
        ("take_int", 3, ""),
        ("take_float", 3, ""),
        ("take_optional", None, ""),
        ("take_numbers", [1, 2], ""),
        ("take_path", "/a/b", ""),
        ("take_moment", "2020-01-01", ""),
        ("take_report", {"auc": 1}, ""),
    ],
)
def test_values_are_checked_against_simple_annotations(
    uses: str, value: Any, expected: str
) -> None:
    found = problems(taken={"uses": uses, "with": {"x": value}, "mode": "effect"})
    assert expected in found if expected else not found


@pytest.mark.parametrize(
    ("given", "taken", "expected"),
    [
        ("numbers", "int", ""),
        ("texts", "str", ""),
        ("tables", "table", ""),
        ("anything", "int", ""),
        ("numbers", "str", "$given is int"),
        ("tables", "int", "$given is Table"),
        ("number", "int", "is not a list but int"),
        ("table", "table", "is not a list but Table"),
        ("mapping", "int", "is not a list but dict[str, int]"),
    ],
)
def test_one_maps_over_lists_and_elements_must_fit(given: str, taken: str, expected: str) -> None:
    steps = edge(given, taken)
    del steps["taken"]["with"]
    steps["taken"]["map"] = {"x": "$given"}
    found = problems(**steps)
    assert expected in found if expected else not found


def test_the_output_of_a_mapped_step_is_a_list() -> None:
    mapped = {"uses": "take_int", "map": {"x": "$numbers"}}
    last = {"uses": "take_numbers", "with": {"x": "$mapped"}, "mode": "effect"}
    assert not problems(numbers={}, mapped=mapped, last=last)
    assert "list[int]" in problems(numbers={}, mapped=mapped, last=last | {"uses": "take_str"})


def test_conditions_ask_for_what_can_be_answered() -> None:
    assert "asks for JSON values" in problems(**edge("table", "any", when="$given"))
    assert "has no answer" in problems(**edge("report", "any", when="$given.name > 3"))
    assert "has no answer" in problems(**edge("report", "any", when="$given.auc > 'x'"))
    assert not problems(**edge("report", "any", when="$given.auc >= 0.7"))
    assert not problems(**edge("report", "any", when="$given.name == 'x'"))


def test_steps_that_can_never_run_are_found() -> None:
    one = {"uses": "take_any", "with": {"x": 1}, "when": "$gate.passed", "mode": "effect"}
    two = one | {"when": "not $gate.passed"}
    both = {"uses": "take_any", "with": {"x": ["$one", "$two"]}, "mode": "effect"}
    found = problems(gate={}, one=one, two=two, both=both)
    assert "workflow.steps.both: can never run: it needs" in found
    assert "$gate.passed and not $gate.passed" in found
    assert not problems(gate={}, one=one, two=two)


def test_a_narrow_window_is_possible_and_an_empty_one_is_not() -> None:
    low = {"uses": "take_any", "with": {"x": 1}, "when": "$report.auc > 0.5", "mode": "effect"}
    high = low | {"with": {"x": "$low"}}
    assert not problems(report={}, low=low, high=high | {"when": "$report.auc < 0.6"})
    assert "can never run" in problems(
        report={}, low=low, high=high | {"when": "$report.auc < 0.5"}
    )


def test_outputs_that_nobody_uses_are_warned_of_and_refused_where_outputs_are_declared() -> None:
    used = {"uses": "take_any", "with": {"x": "$number"}}
    assert "workflow.steps.used: nothing uses its output" in warnings(number={}, used=used)
    assert not problems({"result": "$used"}, number={}, used=used)
    found = problems({"result": "$used"}, number={}, used=used, text={})
    assert "workflow.steps.text: nothing uses its output" in found
    assert not warnings(number={}, used=used | {"mode": "effect"})


def test_a_pure_step_may_not_be_marked_and_evident_effects_are_warned_of() -> None:
    assert "is marked @effect" in problems(send={})
    assert "Set mode: ensure" in problems(serve={})
    assert not problems(send={"mode": "effect"}, serve={"mode": "ensure"})
    assert "calls subprocess.run (line" in warnings(shell={})
    assert "calls requests.post" in warnings(post={})
    assert "calls .send_message" in warnings(mail={})
    assert "calls" not in warnings(get={})
    assert not warnings(shell={"mode": "effect"})


def test_options_that_contradict_each_other_are_found() -> None:
    found = problems(number={"idempotent": False})
    assert "number.idempotent: is for steps of mode effect" in found
    grouped = {"mode": "effect", "group": "g"}
    assert "process of its own" in problems(number=grouped | {"idempotent": False})
    one = grouped | {"environment": {"runtime": {"pip": ["x"]}}}
    assert "share one process" in problems(number=one, text=grouped)
    assert not problems(number=one, text=one)
    wrong = {"environment": {"runtime": {"env_var": {}}}, "mode": "effect"}
    assert "Did you mean env_vars?" in problems(number=wrong)


def test_no_key_of_ray_s_runtime_environments_is_refused() -> None:
    from ray.runtime_env import RuntimeEnv

    runtime = {key: None for key in RuntimeEnv.known_fields if not key.startswith("_")}
    assert not problems(number={"environment": {"runtime": runtime}, "mode": "effect"})


def test_all_problems_are_found_at_once() -> None:
    found = check(
        report={},
        a={"uses": "take_int", "with": {"x": "$reprot"}},
        b={"uses": "take_int", "with": {"x": "$report.acu"}},
        c={"uses": "take_table", "with": {"x": "$report"}},
        d={"uses": "send"},
        e={"uses": "take_int", "with": {"x": "$f"}},
        f={"uses": "take_int", "with": {"x": "$e"}},
    )
    text = "\n".join(map(str, found.problems))
    for expected in ("Did you mean $report?", "$report.auc", "takes Table", "@effect", "cycle"):
        assert expected in text
    assert len(found.problems) == 5


def nested(inner: dict[str, Any], **outer: Any) -> Findings:
    """Check a workflow with a nested one and an effect that takes its output ``one``."""
    for step in inner["steps"].values():
        step["uses"] = f"{NAME}.steps.{step['uses']}"
    last = {"uses": f"{NAME}.steps.take_any", "with": {"x": "$outer.one"}, "mode": "effect"}
    steps = {"outer": {"workflow": {"name": "inner", **inner}, **outer}, "last": last}
    return check_workflow(Workflow.model_validate({"name": "w", "steps": steps}), [NAME])


def test_types_and_unused_outputs_are_checked_inside_nested_workflows() -> None:
    one, two = {"uses": "table"}, {"uses": "take_int", "with": {"x": "$one"}}
    found = nested({"outputs": {"one": "$one"}, "steps": {"one": one, "two": two}})
    text = "\n".join(map(str, found.problems))
    assert "workflow.steps.outer.workflow.steps.two.with.x: $outer/one is Table" in text
    assert "workflow.steps.outer.workflow.steps.two: nothing uses its output" in text
    assert len(found.problems) == 2
    found = nested({"outputs": {"one": "$one.x"}, "steps": {"one": {"uses": "table"}}})
    text = "\n".join(map(str, found.problems))
    assert "workflow.steps.outer.workflow.outputs.one: $outer/one.x: Table has no part" in text


def test_what_a_nested_workflow_is_given_is_checked_and_inputs_must_be_asked_for() -> None:
    one = {"uses": "take_int", "with": {"x": "$inputs.n"}}
    inner = {"inputs": {"n": None, "m": 1}, "outputs": {"one": "$one"}}
    found = nested(inner | {"steps": {"one": dict(one)}}, **{"with": {"n": "many"}})
    assert "Got 'many', expected int" in str(found.problems[0])
    assert "inputs.m: nothing inside asks for this input" in str(found.warnings[0])


def test_a_nested_part_that_is_switched_off_is_warned_of_with_all_that_needs_it() -> None:
    inner = {"inputs": {"on": True}, "outputs": {"one": "$one"}}
    steps = {"one": {"uses": "number", "when": "$inputs.on"}}
    found = nested(inner | {"steps": steps}, **{"with": {"on": False}})
    assert not found.problems
    assert [str(warning) for warning in found.warnings] == [
        "workflow.steps.outer.workflow.steps.one.when: never runs: false does not hold.",
        "workflow.steps.last: never runs: it needs outer/one, which never runs.",
    ]
    steps = {"one": {"uses": "number", "when": "$inputs.on"}}
    assert not nested(inner | {"steps": steps}).warnings


def test_a_step_that_others_wait_for_or_that_returns_nothing_is_used() -> None:
    last = {"uses": "take_any", "with": {"x": 1}, "after": ["number"]}
    assert not problems({"result": "$last"}, number={}, nothing={}, last=last)


def test_what_pydantic_may_convert_is_a_warning() -> None:
    for given, taken in (("ratio", "int"), ("wide", "narrow")):
        assert not problems(**edge(given, taken))
        assert "it may not fit" in warnings(**edge(given, taken))
    assert "workflow.steps.taken.with.x" in problems(**edge("narrow", "wide"))


def test_parts_of_a_tuple_have_the_kinds_of_their_positions() -> None:
    taken = {"uses": "take_table", "with": {"x": "$both.0"}, "mode": "effect"}
    assert not check(both={}, taken=dict(taken)).warnings
    wrong = taken | {"with": {"x": "$both.1"}}
    assert "$both.1 is Report, and" in problems(both={}, taken=dict(wrong))
    none = taken | {"with": {"x": "$both.2"}}
    assert "has no part '2'" in problems(both={}, taken=dict(none))


def test_an_asynchronous_step_is_a_problem() -> None:
    assert "is asynchronous" in problems(later={"mode": "effect"})


def test_a_folder_given_as_a_path_is_warned_of(project: Path) -> None:
    def found(path: Path, mode: str = "pure") -> str:
        step = {"uses": "take_path", "with": {"x": str(path)}, "mode": mode}
        return warnings(taken=step)

    assert "what the folder holds does not count" in found(project)
    assert "folder" not in found(project / "steps.py")
    assert "folder" not in found(project, "effect")


def test_the_list_of_a_mapped_step_is_no_condition_but_a_part_of_it_may_be() -> None:
    mapped = {"uses": "take_int", "map": {"x": "$numbers"}}
    last = {"uses": "take_any", "with": {"x": 1}, "mode": "effect"}
    for when in ("$mapped", "$mapped == 3"):
        found = problems(numbers={}, mapped=mapped, last=last | {"when": when})
        assert "workflow.steps.last.when: $mapped is list[int]: a condition asks for JSON" in found
    assert not problems(numbers={}, mapped=mapped, last=last | {"when": "$mapped.0 == 3"})


@pytest.mark.parametrize("timeout", ["0s", "0ms", 0])
def test_a_timeout_of_nothing_is_refused(timeout: str | int) -> None:
    with pytest.raises(ValidationError, match="greater than"):
        Step.model_validate({"uses": "a.b", "timeout": timeout})
