"""``mlops-ray init``: what it makes runs at once; what it refuses leaves nothing behind."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mlops_ray.cli.init import render, write_project
from mlops_ray.config.locate import open_workspace
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.load import load_project

ROOT = Path(__file__).parents[2]
SCAFFOLD = ROOT / "mlops_ray/cli/scaffold"
NAME = "late_orders"
CHANGE = pd.Timestamp("2024-03-01", tz="UTC")


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def run(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, cwd=directory, capture_output=True, text=True, check=False)


def test_a_new_project_passes_check_as_it_is(command: Any) -> None:
    assert command("init", NAME).code == 0
    for workflow in ("train", "features"):
        outcome = command("-C", NAME, "check", f"workflow={workflow}")
        assert (outcome.code, outcome.err) == (0, "")
        assert f"ok: project {NAME}, workflow {workflow}" in outcome.out


def test_every_workflow_that_comes_with_the_package_fits_a_new_project(command: Any) -> None:
    command("init", NAME)
    names = sorted(path.stem for path in (ROOT / "configs/workflow").glob("*.yaml"))
    assert {"train", "features"} <= set(names)
    failed = {name: command("-C", NAME, "check", f"workflow={name}").err for name in names}
    assert not any(failed.values()), failed


def test_the_printed_commands_are_the_ones_that_come_next(command: Any, tmp_path: Path) -> None:
    outcome = command("init", NAME, "--directory", "somewhere/my orders", "--package", "shop")
    lines = [line.strip() for line in outcome.out.splitlines() if line.startswith("  ")]
    assert lines[1:] == ["mlops-ray check", "mlops-ray run workflow=train"]
    folder = shlex.split(lines[0])
    assert folder == ["cd", "somewhere/my orders"]
    assert (tmp_path / folder[1] / "shop/data.py").is_file()
    assert command("-C", folder[1], "check").code == 0


def test_each_template_becomes_a_file_without_placeholders(tmp_path: Path) -> None:
    write_project(tmp_path, NAME, "shop")
    assert len(files(tmp_path)) == len(files(SCAFFOLD)) == len(list(render(NAME, "shop")))
    for name in files(tmp_path):
        assert "{{" not in name + (tmp_path / name).read_text(encoding="utf-8"), name
        assert not name.endswith(".template")
    assert {".gitignore", "shop/data.py", f"configs/project/{NAME}.yaml"} <= set(files(tmp_path))


def test_the_files_of_a_new_project_mean_what_they_should(tmp_path: Path) -> None:
    write_project(tmp_path, NAME, "shop")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert project["tool"]["mlops-ray"]["projects"] == ["."]
    assert project["project"]["name"] == NAME
    config = yaml.safe_load((tmp_path / f"configs/project/{NAME}.yaml").read_text())
    assert (config["name"], config["package"]) == (NAME, "shop")
    assert config["batch"]["model"] == f"{NAME}@champion"
    goal = (tmp_path / "docs/goal.md").read_text()
    assert all(f"(S{number})" in goal for number in range(1, 6))
    readme = (tmp_path / "README.md").read_text()
    assert all(f"] S{number} " in readme for number in range(1, 13))


def test_the_code_of_a_new_project_is_clean_and_its_tests_pass(tmp_path: Path) -> None:
    write_project(tmp_path, NAME, NAME)
    settings = str(ROOT / "pyproject.toml")
    checks = [
        ("ruff", "check", "--no-cache", "--config", settings, "."),
        ("ruff", "format", "--check", "--no-cache", "--config", settings, "."),
        ("mypy", "--strict", "--ignore-missing-imports", "--cache-dir", "mypy", NAME),
        ("pytest", "-q", "-p", "no:cacheprovider"),
    ]
    for check in checks:
        result = run(*check, directory=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "name",
    ["Late-Orders", "1st", "late orders", "../up", "", "null", "on", "käse", "a" * 64, "a.b", "_a"],
)
def test_a_name_that_cannot_be_one_is_refused(command: Any, tmp_path: Path, name: str) -> None:
    outcome = command("init", "--directory", "new", "--package", "shop", "--", name)
    assert outcome.code == 2
    assert "cannot be a project's name; nothing was written" in outcome.err
    assert "fix: use lower-case letters" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "why"),
    [
        ("class", ""),
        ("My_Shop", "for example my_shop"),
        ("a.b", "for example a_b"),
        ("json", "installed module"),
        ("numpy", "installed module"),
        ("mlops_ray", "installed module"),
        ("tests", "a folder of that name"),
        ("configs", "a folder of that name"),
    ],
)
def test_a_package_that_would_not_work_is_refused(
    command: Any, tmp_path: Path, package: str, why: str
) -> None:
    outcome = command("init", NAME, "--package", package)
    assert outcome.code == 2
    assert f"{package!r} cannot be a package's name" in outcome.err
    assert why in outcome.err
    assert "--package" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_refused_name_comes_with_one_that_works(command: Any) -> None:
    refused = command("init", "Late-Orders").err
    assert f"for example {NAME}\n" in refused
    assert command("init", NAME).code == 0


def test_what_is_there_already_is_left_alone(command: Any, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for folder in (NAME, "file", "link"):
        outcome = command("init", NAME, "--directory", folder)
        assert outcome.code == 1
        assert f"{folder}: there is something there already; nothing was written" in outcome.err
    assert files(tmp_path) == ["file", f"{NAME}/notes.txt"]


def test_an_empty_folder_is_filled(command: Any, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert command("init", NAME).code == 0
    assert command("-C", NAME, "check").code == 0


def test_the_present_folder_can_be_the_project(command: Any) -> None:
    assert command("init", NAME, "--directory", ".").code == 0
    assert command("check").code == 0


def test_a_place_that_cannot_be_written_is_named(command: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = command("init", NAME, "--directory", "file/below")
    assert outcome.code == 1
    assert "file/below: the project cannot be written" in outcome.err
    assert "Not a directory" in outcome.err


def test_the_wheel_holds_the_scaffold(tmp_path: Path) -> None:
    result = run("hatchling", "build", "-t", "wheel", "-d", str(tmp_path), directory=ROOT)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    for name in files(SCAFFOLD):
        assert packed[f"mlops_ray/cli/scaffold/{name}"] == (SCAFFOLD / name).read_bytes()


def training_set(folder: Path) -> Any:
    """Return the generated orders with their features as of the order, made without Ray."""
    from mlops_ray.features import steps

    project = load_project(open_workspace(folder), ["until=2024-04-05"])
    context = Context(project=NAME, home=Home(folder / "home"))
    raw = steps.extract(context, project.features)
    tables = steps.clean(replace(context, step="clean"), project.features, raw)
    versions = steps.materialize(context, project.features, tables, project.until)
    service = project.training.service
    return steps.training_set(context, project.features, service, tables, versions, project.until)


def test_the_generated_world_can_be_learnt_and_drifts(command: Any, tmp_path: Path) -> None:
    command("init", NAME)
    data = training_set(tmp_path / NAME).to_pandas()
    assert 5800 < len(data) <= 6000
    leaking = ["order_id", "ordered_at", "promised_at", "delivered_at", "late"]
    features = pd.get_dummies(data.drop(columns=leaking)).fillna(0).astype(float)
    week = pd.Timedelta(days=7)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    first = data.ordered_at < CHANGE - 2 * week
    fitted.fit(features[first], data.late[first])
    loss, auc = {}, {}
    for when, since in (("before", CHANGE - 2 * week), ("after", CHANGE)):
        rows = (data.ordered_at >= since) & (data.ordered_at < since + week)
        score = fitted.predict_proba(features[rows])[:, 1]
        loss[when] = log_loss(data.late[rows], score)
        auc[when] = roc_auc_score(data.late[rows], score)
    assert auc["before"] > 0.7
    assert loss["after"] > loss["before"] + 0.05
    late = data.groupby(data.ordered_at >= CHANGE).late.mean()
    assert late[True] > late[False] + 0.1
    assert not (data.region[data.ordered_at < CHANGE] == "harbour").any()
    assert (data.region[data.ordered_at >= CHANGE] == "harbour").mean() > 0.25


def test_a_new_project_trains_a_champion(ray_cluster: Any, command: Any, tmp_path: Path) -> None:
    command("init", NAME)
    outcome = command("-C", NAME, "run", "workflow=train", "training.epochs=1")
    assert outcome.code == 0, outcome.err
    home = Home(tmp_path / NAME / ".mlops-ray")
    (record,) = Ledger(home.ledger_url).runs()
    states = {step.name: step.status for step in Ledger(home.ledger_url).steps(record.run_id)}
    assert record.status == "succeeded"
    assert set(states.values()) == {"succeeded"}, states
    shown = command("-C", NAME, "models", "list").out
    assert f"{NAME}@1" in shown
    assert "champion" in shown
    assert command("-C", NAME, "models", "list", NAME).out == shown
    again = command("-C", NAME, "plan", "training.epochs=1").out
    assert "has effects" in again


def test_the_first_model_sees_nothing_of_the_change(tmp_path: Path) -> None:
    write_project(tmp_path, NAME, NAME)
    project = load_project(open_workspace(tmp_path), [])
    assert project.until is not None
    assert project.replay is not None
    assert project.until <= project.replay.start < CHANGE < project.replay.end
    assert project.replay.end <= datetime(2024, 1, 1, tzinfo=UTC) + np.timedelta64(90, "D").item()
