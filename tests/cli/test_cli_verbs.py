"""The verbs as a person meets them: help, mistakes and what is said about them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest

from mlops_ray import __version__
from mlops_ray.cli.init import write_project
from mlops_ray.cli.main import Verbs
from mlops_ray.config.locate import open_workspace
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import RunRecord, StepChange
from mlops_ray.orchestration.load import load_project

ROOT = Path(__file__).parents[2]
VERBS = [
    *("init", "check", "plan", "run", "submit", "predict", "why", "cancel", "resolve"),
    *("features", "status", "logs", "models", "endpoints", "lineage", "reproduce", "gc"),
    *("tokens", "triggers", "doctor"),
]
HEAVY = ["ray", "torch", "mlflow", "pyarrow", "numpy", "sqlalchemy", "hydra", "deltalake", "scipy"]
NAME = "late_orders"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A new project in the folder where commands run."""
    write_project(tmp_path, NAME, NAME)
    return tmp_path


def python(*arguments: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("MLOPS_RAY_HOME", None)
    line = [sys.executable, *arguments]
    return subprocess.run(
        line, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def ledger_with_runs(home: Home, count: int) -> list[str]:
    ledger = Ledger(home.ledger_url)
    names = [f"run-{number}" for number in range(count)]
    for name in names:
        record = RunRecord(
            run_id=name,
            project=NAME,
            workflow="train",
            status="running",
            config_digest="0",
            started_at=datetime.now(UTC),
            ended_at=None,
            owner="here:1:1",
            config={},
            provenance={},
        )
        ledger.start_run(record, ["extract", "clean"])
        ledger.finish_run(name, "failed")
    done = {"status": "succeeded", "rows": 12345}
    ledger.apply([StepChange(run_id=names[-1], name="extract", values=done)])
    ledger.append(NAME, "promotion", {"version": 7}, run_id=names[-1])
    ledger.close()
    return names


def test_help_lists_every_verb_with_a_whole_sentence(command: Any) -> None:
    outcome = command("--help")
    assert outcome.code == 0
    listed = outcome.out.partition("Commands:")[2].partition("Examples:")[0].splitlines()
    sentences = dict(line.split(maxsplit=1) for line in listed if line.strip())
    assert list(sentences) == VERBS
    assert all(s.endswith(".") and not s.endswith("...") for s in sentences.values())


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_says_what_it_does_and_what_it_takes(command: Any, verb: str) -> None:
    outcome = command(verb, "-h")
    assert outcome.code == 0
    usage, promise, *rest = [line for line in outcome.out.splitlines() if line.strip()]
    assert usage.startswith(f"Usage: mlops-ray {verb}")
    assert len(promise.split()) >= 5
    documented = [line for line in rest if line.strip().startswith("-")]
    assert all(len(line.split("  ")) > 1 for line in documented)


def test_help_of_all_verbs_loads_nothing_heavy() -> None:
    code = f"""
import sys
from mlops_ray.cli.main import cli
for verb in {[[], *[[verb] for verb in VERBS]]}:
    cli([*verb, "--help"], standalone_mode=False)
print("LOADED", [name for name in {HEAVY} if name in sys.modules])
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "LOADED []"


def test_the_module_runs_as_the_command_does() -> None:
    result = python("-m", "mlops_ray", "--version")
    assert result.stdout.strip() == f"mlops-ray, version {__version__}"


def test_a_verb_that_is_not_there_names_the_one_that_was_meant(command: Any) -> None:
    outcome = command("chekc")
    assert outcome.code == 2
    assert "there is no verb 'chekc'. Did you mean check?" in outcome.err
    assert "Verbs: init, check" in command("zzz").err


def test_check_accepts_a_good_project_and_overrides(command: Any, project: Path) -> None:
    outcome = command("check", "workflow=features", "training.epochs=9", "+loop.max_retrainings=2")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"ok: project {NAME}, workflow features with 3 steps, 2 feature views\n"
    assert not (project / ".mlops-ray").exists()


@pytest.mark.parametrize(
    ("right", "wrong", "path", "meant"),
    [
        ("  epochs: 2", "  epohcs: 2", "training.epohcs", "epochs"),
        ("  hidden_sizes:", "  hidden_sise:", "model.hidden_sise", "hidden_sizes"),
        ("      ttl: 7d  ", "      tll: 7d  ", "features.views.courier_latest.tll", "ttl"),
    ],
)
def test_check_names_file_line_and_the_key_that_was_meant(
    command: Any, project: Path, right: str, wrong: str, path: str, meant: str
) -> None:
    file = project / f"configs/project/{NAME}.yaml"
    assert file.read_text().count(right) == 1
    file.write_text(file.read_text().replace(right, wrong))
    number = file.read_text()[: file.read_text().index(wrong)].count("\n") + 1
    outcome = command("check")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines() == [
        "error: 1 problem in the configuration",
        f"  configs/project/{NAME}.yaml:{number} → {path}: unknown key. Did you mean {meant}?",
    ]


def test_check_reports_every_problem_at_once(command: Any, project: Path) -> None:
    outcome = command("check", "training.epochs=many", "serving.prot=80", "nonsense=1")
    first, *problems = outcome.err.splitlines()
    assert (outcome.code, first) == (2, "error: 3 problems in the configuration")
    assert sorted(line.split("→")[1].split(":")[0].strip() for line in problems) == [
        "nonsense",
        "serving.prot",
        "training.epochs",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.service=delivry", "no feature service 'delivry'. Did you mean delivery?"),
        ("workflow=trian", "there is no workflow named 'trian'. Did you mean train?"),
        ("project=late_order", f"there is no project named 'late_order'. Did you mean {NAME}?"),
        ("training.epochs", "command line → training.epochs: cannot be read as an override"),
        ("training.epochs=1,2", "add --multirun"),
        ("gate.metric=accuracy", "gate.metric: Input should be 'auc' or 'log_loss'"),
        ("model._target_=os.system", "'os.system' is not on the allow-list"),
        ("features.views.courier_latest.ttl=soon", "'soon' is not a duration"),
    ],
)
def test_mistakes_in_overrides_are_explained(
    command: Any, project: Path, override: str, message: str
) -> None:
    outcome = command("check", override)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("verb", ["check", "plan", "run", "submit"])
def test_a_folder_without_a_project_says_how_to_make_one(
    command: Any, tmp_path: Path, verb: str
) -> None:
    outcome = command(verb, "workflow=train")
    assert outcome.code == 2
    assert f"{tmp_path} → project: there is no configs/project/*.yaml." in outcome.err
    assert "mlops-ray init NAME" in outcome.err


def test_the_traceback_is_shown_with_debug_only(project: Path) -> None:
    arguments = ("-m", "mlops_ray", "check", "training.epochs=many")
    plain = python(*arguments, directory=project)
    debug = python(*arguments[:2], "--debug", *arguments[2:], directory=project)
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "training.epochs" in plain.stderr
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "ConfigError" in debug.stderr


def test_an_unforeseen_error_is_short_and_says_how_to_see_more(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def broken() -> None:
        raise RuntimeError("something odd")

    monkeypatch.setattr(Verbs, "get_command", lambda *_: broken)
    outcome = command("check")
    assert outcome.code == 1
    assert "internal error: RuntimeError: something odd" in outcome.err
    assert "--debug" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_interrupt_says_how_to_go_on(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Verbs, "get_command", lambda *_: interrupted)
    outcome = command("run")
    assert outcome.code == 130
    assert "the same command goes on from the finished steps" in outcome.err


def test_directory_is_where_the_command_works(command: Any, tmp_path: Path) -> None:
    write_project(tmp_path / "deep/project", NAME, NAME)
    assert command("check").code == 2
    assert command("-C", "deep/project", "check").code == 0
    assert command("--directory", str(tmp_path / "deep/project"), "plan").code == 0
    assert (tmp_path / "deep/project/.mlops-ray").is_dir()
    missing = command("-C", "nowhere", "check")
    assert missing.code == 2
    assert "'nowhere' does not exist" in missing.err


def test_plan_on_a_fresh_home_shows_every_step_in_order(command: Any, project: Path) -> None:
    steps = list(load_project(open_workspace(project), ["workflow=train"]).workflow.steps)
    outcome = command("plan", "workflow=train")
    assert outcome.code == 0
    title, _header, *rows = outcome.out.splitlines()
    assert title.strip() == f"{NAME} · train"
    shown = [row.split()[1] for row in rows]
    assert sorted(shown) == sorted(steps)
    assert shown.index("extract") < shown.index("clean") < shown.index("fit")
    assert shown.index("fit") < shown.index("register") < shown.index("promote")
    states = {row.split()[1]: row for row in rows}
    assert " run " in states["extract"]
    assert all(" depends on " in row for name, row in states.items() if name != "extract")


def test_status_where_nothing_has_run(command: Any, project: Path) -> None:
    for _ in range(2):
        outcome = command("status")
        assert outcome.code == 1
        assert f"{project / '.mlops-ray'}: nothing has run here yet" in outcome.err
        assert "fix: run a workflow first" in outcome.err
        command("plan")


def test_status_lists_runs_and_shows_one(command: Any, project: Path) -> None:
    names = ledger_with_runs(Home(project / ".mlops-ray"), 3)
    listed = command("status", "--limit", "2")
    assert listed.code == 0
    assert [name in listed.out for name in names] == [False, True, True]
    shown = command("status", names[-1])
    assert "12,345" in shown.out
    assert "promotion" in shown.out
    content = json.loads(command("status", names[-1], "--json").out)
    assert [step["name"] for step in content["steps"]] == ["extract", "clean"]
    assert [run["run_id"] for run in json.loads(command("status", "--json").out)] == names[::-1]
    assert json.loads(command("status", "--json", "--project", "other").out) == []
    missing = command("status", "run-9")
    assert missing.code == 1
    assert "there is no run 'run-9'" in missing.err


@pytest.mark.parametrize("arguments", [("list",), ("list", NAME), ("show", f"{NAME}@champion")])
def test_models_where_nothing_is_registered(
    command: Any, project: Path, arguments: tuple[str, ...]
) -> None:
    outcome = command("models", *arguments)
    assert outcome.code == 1
    assert "nothing is registered here yet" in outcome.err
    assert "run the train workflow first" in outcome.err
    assert not (project / ".mlops-ray").exists()


@pytest.mark.parametrize("arguments", [("models", "list", NAME), ("reproduce", f"{NAME}@1")])
def test_a_tracking_server_is_asked_what_is_registered(
    command: Any, project: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MLOPS_RAY_TRACKING", "http://127.0.0.1:9")
    outcome = command(*arguments)
    assert outcome.code == 1
    assert "http://127.0.0.1:9: MLflow cannot be reached" in outcome.err


def test_submit_without_a_cluster_says_how_to_start_one(command: Any, project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    outcome = command("submit", "--address", f"http://127.0.0.1:{port}", "workflow=train")
    assert outcome.code == 1
    assert f"127.0.0.1:{port}: the Ray job server cannot be reached" in outcome.err
    assert "ray start --head" in outcome.err


def test_doctor_tells_what_is_wrong_and_how_to_mend_it(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-token")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        busy = command("doctor", "--serve-port", port)
    assert busy.code == 0
    assert f"! ports: {port} (the endpoint) is in use\n    fix: " in busy.out
    assert "serving.port" in busy.out
    assert "secret-token" not in busy.out
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    lost = command("doctor")
    assert lost.code == 1
    assert f"✗ address: $RAY_ADDRESS is 127.0.0.1:{port}, which does not answer" in lost.out
