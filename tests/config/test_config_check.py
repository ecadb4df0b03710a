"""From files and overrides to a frozen project, or to every problem at once."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlops_ray.config.check import is_allowed
from mlops_ray.config.compose import sweep
from mlops_ray.config.locate import Workspace, open_workspace
from mlops_ray.errors import ConfigError
from mlops_ray.orchestration.load import load_project

PROJECT = """\
# @package _global_
name: shop
package: shop_code
features:
  sources:
    orders: {path: orders.csv, available_at: at}
  entities:
    customer: {keys: {customer: string}}
  views:
    facts: {entity: customer, source: orders, event_time: at, columns: [amount], ttl: 2d}
  services:
    basic:
      views: [facts]
      time: at
      inputs: {customer: {dtype: string}, at: {dtype: timestamp}}
  labels: {source: orders, id: id, time: at, label: late, known_at: known_at}
model:
  _target_: mlops_ray.training.models.TabularNet
  dropout: 0.1
training:
  service: basic
"""
WORKFLOW = """\
name: small
steps:
  first: {uses: shop_code.steps.first, with: {count: 3}}
  second: {uses: shop_code.steps.second, with: {table: $first}}
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "configs/project").mkdir(parents=True)
    (tmp_path / "configs/workflow").mkdir()
    (tmp_path / "configs/project/shop.yaml").write_text(PROJECT)
    (tmp_path / "configs/workflow/small.yaml").write_text(WORKFLOW)
    (tmp_path / "shop_code").mkdir()
    (tmp_path / "shop_code/__init__.py").write_text("")
    (tmp_path / "shop_code/steps.py").write_text(
        textwrap.dedent(
            """
            raise RuntimeError("checking must not run user code")
            def first(count): ...
            def second(context, table, extra=1): ...
            """
        )
    )
    return open_workspace(tmp_path)


def problems(workspace: Workspace, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_project(workspace, ["workflow=small", *overrides])
    return [str(problem) for problem in caught.value.problems]


def test_a_good_project_is_frozen_and_complete(workspace: Workspace) -> None:
    project = load_project(workspace, ["workflow=small", "training.epochs=7"])
    assert project.name == "shop"
    assert project.training.epochs == 7
    assert project.features.views["facts"].ttl is not None
    assert project.features.views["facts"].ttl.days == 2
    assert project.serving.mode == "throughput"
    with pytest.raises(ValidationError):
        project.name = "other"  # type: ignore[misc]


def test_the_only_project_needs_no_naming_but_a_wrong_one_is_refused(workspace: Workspace) -> None:
    (line,) = problems(workspace, "project=shpo")
    assert "there is no project named 'shpo'. Did you mean shop?" in line


def test_a_typo_in_an_override_names_the_key_that_was_meant(workspace: Workspace) -> None:
    (line,) = problems(workspace, "model.droput=0.3")
    assert line == "command line → model.droput: unknown key. Did you mean dropout?"


def test_a_typo_in_a_file_names_file_line_and_key(workspace: Workspace) -> None:
    file = workspace.directory / "configs/project/shop.yaml"
    file.write_text(PROJECT.replace("  service: basic", "  service: basic\n  epohcs: 3"))
    (line,) = problems(workspace)
    number = file.read_text().splitlines().index("  epohcs: 3") + 1
    assert line.startswith(f"configs/project/shop.yaml:{number} → training.epohcs: unknown key.")
    assert line.endswith("Did you mean epochs?")


def test_all_problems_come_at_once(workspace: Workspace) -> None:
    lines = problems(
        workspace,
        "training.epochs=many",
        "serving.prot=80",
        "gate.metric=aux",
        "features.views.facts.ttl=soon",
        "nonsense=1",
        "model.droput=0.3",
        "+workflow.steps.second.with.etxra=2",
    )
    text = "\n".join(lines)
    assert len(lines) == 7
    for part in ("training.epochs", "serving.prot", "gate.metric", "views.facts.ttl", "nonsense"):
        assert part in text
    assert "Did you mean port?" in text
    assert "'soon' is not a duration" in text


def test_references_inside_the_feature_store_are_checked(workspace: Workspace) -> None:
    (line,) = problems(workspace, "features.views.facts.entity=custmer")
    assert "views.facts.entity names 'custmer'" in line


@pytest.mark.parametrize(
    "override",
    [
        "model._target_=os.system",
        "model._target_=mlops_ray_evil.models.Net",
        "+model.activation={_target_: subprocess.Popen}",
        "workflow.steps.first.uses=builtins.eval",
        "+features.sources.orders.clean=shutil.rmtree",
        "+workflow.steps.first.with.extra={_target_: os.system}",
        "+serving.graph.before=[os.system]",
        "+serving.graph.after=[mlops_ray.config.base.Frozen,os.system]",
        "+serving.autoscaling.policy=os.system",
    ],
)
def test_dotted_names_outside_the_allow_list_are_refused(
    workspace: Workspace, override: str
) -> None:
    assert any("is not on the allow-list" in line for line in problems(workspace, override))


def test_the_user_may_widen_the_allow_list(workspace: Workspace) -> None:
    override = ["model._target_=json.decoder.JSONDecoder", "allow=[json]"]
    values = load_project(workspace, ["workflow=small", *override, "~model.dropout"])
    assert values.model.target == "json.decoder.JSONDecoder"
    assert is_allowed("json.decoder.X", ["json"])
    assert not is_allowed("jsonx.X", ["json"])


def test_a_name_that_does_not_exist_is_found_without_importing_user_code(
    workspace: Workspace,
) -> None:
    (line,) = problems(workspace, "workflow.steps.first.uses=shop_code.steps.frist")
    assert "shop_code.steps has no 'frist'. Did you mean first?" in line


def test_inputs_of_steps_are_checked_against_the_function(workspace: Workspace) -> None:
    lines = problems(workspace, "+workflow.steps.second.with.etxra=2", "~workflow.steps.first.with")
    assert any("with.etxra: unknown key. Did you mean extra?" in line for line in lines)
    assert any("shop_code.steps.first needs 'count'" in line for line in lines)


def test_missing_values_and_broken_interpolations_are_named(workspace: Workspace) -> None:
    (line,) = problems(workspace, "training.service=???")
    assert "training.service" in line
    (line,) = problems(workspace, "training.service=${nope.x}")
    assert "nope" in line


def test_broken_yaml_is_an_error_with_a_place(workspace: Workspace) -> None:
    file = workspace.directory / "configs/project/shop.yaml"
    file.write_text(PROJECT + "training: [\n")
    (line,) = problems(workspace)
    assert "shop.yaml" in line


def test_sweeps_are_the_product_of_the_choices() -> None:
    combinations = sweep(["a=1,2", "b.c=x", "d=choice(5,6)"])
    assert combinations == [
        ["a=1", "b.c=x", "d=5"],
        ["a=1", "b.c=x", "d=6"],
        ["a=2", "b.c=x", "d=5"],
        ["a=2", "b.c=x", "d=6"],
    ]


def test_a_sweep_without_multirun_is_refused(workspace: Workspace) -> None:
    (line,) = problems(workspace, "training.epochs=1,2")
    assert "multirun" in line


def test_group_choices_and_additions_work_as_in_hydra(workspace: Workspace) -> None:
    project = load_project(
        workspace, ["workflow=small", "serving=plain", "+tuning.trials=3", "loop.cooldown=2d"]
    )
    assert project.serving.mode == "default"
    assert project.tuning.trials == 3
    assert project.loop.cooldown.days == 2


@pytest.mark.parametrize(
    "override",
    [
        "~model._target_ +model.target=os.getcwd",
        "+workflow.steps.first.with.extra={sources: {x: {read: os.system}}}",
        "workflow.steps.first.uses=mlops_ray.config.signatures.Path",
        "workflow.steps.first.uses=mlops_ray.config.targets.import_module",
        "+tuning.space={model._target_: {kind: choice, values: [os.system]}}",
    ],
)
def test_there_is_no_way_around_the_allow_list(workspace: Workspace, override: str) -> None:
    parts = override.split(" +", 1)
    overrides = [parts[0], *(f"+{part}" for part in parts[1:])]
    assert problems(workspace, *overrides)


def test_a_worker_loads_only_what_is_allowed() -> None:
    from mlops_ray.config import targets
    from mlops_ray.errors import MlopsRayError

    try:
        targets.allow(["mlops_ray"])
        assert targets.load("mlops_ray.config.base.Frozen")
        with pytest.raises(MlopsRayError, match="not on the allow-list"):
            targets.load("os.system")
    finally:
        targets.allow([])


def test_a_syntax_error_in_the_projects_code_names_its_line(workspace: Workspace) -> None:
    (workspace.directory / "shop_code/steps.py").write_text("def first(count):\n    return (\n")
    with pytest.raises(ConfigError, match=r"steps\.py:2"):
        load_project(workspace, ["workflow=small"])


def test_a_null_where_a_step_needs_a_value_is_found(workspace: Workspace) -> None:
    (workspace.directory / "shop_code/steps.py").write_text(
        "def first(count: int, extra: int | None): ...\ndef second(context, table, extra=1): ...\n"
    )
    (line,) = problems(
        workspace, "workflow.steps.first.with.count=null", "+workflow.steps.first.with.extra=null"
    )
    assert "workflow.steps.first.with.count: shop_code.steps.first needs a value here" in line


PREPARE = """\
name: prepare
inputs: {count: null, extra: 2}
outputs: {table: $first}
steps:
  first: {uses: shop_code.steps.first, with: {count: $inputs.count}}
"""
NESTING = """\
defaults:
  - /workflow@steps.prepare.workflow: prepare
  - _self_
name: nesting
steps:
  prepare:
    with: {count: 3}
  second: {uses: shop_code.steps.second, with: {table: $prepare.table}, mode: effect}
"""


def nest(workspace: Workspace, prepare: str = PREPARE, nesting: str = NESTING) -> None:
    folder = workspace.directory / "configs/workflow"
    (folder / "prepare.yaml").write_text(prepare)
    (folder / "nesting.yaml").write_text(nesting)


def test_a_workflow_is_nested_by_hydra_s_defaults(workspace: Workspace) -> None:
    nest(workspace)
    workflow = load_project(workspace, ["workflow=nesting"]).workflow
    nested = workflow.steps["prepare"].workflow
    assert nested is not None
    assert nested.name == "prepare"
    assert workflow.steps["prepare"].inputs == {"count": 3}


def test_problems_inside_a_nested_workflow_have_their_file_and_line(workspace: Workspace) -> None:
    prepare = PREPARE.replace("count: $inputs.count", "cuont: $inputs.count").replace(
        "table: $first", "table: $frist"
    )
    nest(workspace, prepare, NESTING.replace("$prepare.table", "$prepare.tabel"))
    with pytest.raises(ConfigError) as caught:
        load_project(workspace, ["workflow=nesting"])
    found = [str(problem) for problem in caught.value.problems]
    path = "workflow.steps.prepare.workflow"
    assert f"configs/workflow/prepare.yaml:5 → {path}.steps.first.with.cuont: unknown key." in str(
        found
    )
    assert f"configs/workflow/prepare.yaml:3 → {path}.outputs.table: there is no step" in str(found)
    assert "configs/workflow/nesting.yaml:8 → workflow.steps.second.with.table" in str(found)


def test_the_schema_s_and_the_graph_s_problems_come_together(workspace: Workspace) -> None:
    found = problems(workspace, "training.epoch=3", "workflow.steps.second.with.table=$frist")
    assert len(found) == 2
    assert "Did you mean epochs?" in str(found)
    assert "Did you mean $first?" in str(found)


def test_code_that_is_not_plainly_at_the_top_raises_no_false_alarm(workspace: Workspace) -> None:
    (workspace.directory / "shop_code/steps.py").write_text(
        textwrap.dedent(
            """
            from typing import Callable
            try:
                import fast
            except ImportError:
                def first(count): ...
            else:
                first: Callable = fast.first
            @with_session
            def second(session, table): ...
            def third(read, check): ...
            """
        )
    )
    named = "+workflow.steps.third={uses: shop_code.steps.third, with: {read: a.csv, check: b.c}}"
    load_project(workspace, ["workflow=small", named])
    (line,) = problems(workspace, "+workflow.steps.second.with.tabel=1")
    assert "with.tabel: unknown key" in line


def test_a_workflow_may_be_declared_in_python(workspace: Workspace) -> None:
    (workspace.directory / "shop_code/flows.py").write_text(
        "from mlops_ray import workflow\nfrom shop_code import counting\n"
        "def nightly(config):\n"
        "    with workflow('nightly') as made:\n"
        "        made.step('count', counting.count, n=config['seed'], mode='effect')\n"
        "    return made\n"
    )
    (workspace.directory / "shop_code/counting.py").write_text("def count(n: int) -> int: ...\n")
    file = workspace.directory / "configs/workflow/nightly.yaml"
    file.write_text("declared_by: shop_code.flows.nightly\n")
    project = load_project(workspace, ["workflow=nightly", "seed=7"])
    assert project.workflow.name == "nightly"
    assert project.workflow.steps["count"].inputs == {"n": 7}
    file.write_text("declared_by: os.system\n")
    with pytest.raises(ConfigError, match=r"nightly.yaml:1 → workflow.declared_by: .* allow-list"):
        load_project(workspace, ["workflow=nightly"])
    file.write_text("declared_by: shop_code.flows.nightly\nname: twice\n")
    with pytest.raises(ConfigError, match="name cannot be given beside it"):
        load_project(workspace, ["workflow=nightly"])


def test_only_inputs_and_features_can_be_redacted(workspace: Workspace) -> None:
    def redact(*names: str) -> str:
        return f"+serving.log.redact=[{','.join(names)}]"

    lines = problems(workspace, redact("custommer", "at", "facts__amount"))
    assert len(lines) == 2
    assert any("'custommer' is neither an input" in line for line in lines)
    assert any("Did you mean customer?" in line for line in lines)
    assert any("'at' is the time of a request" in line for line in lines)
    load_project(workspace, ["workflow=small", redact("customer", "facts__amount")])
