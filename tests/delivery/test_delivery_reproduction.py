"""A registered version is made again bit for bit, from what the ledger and the repository know."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cli.conftest import command

from mlops_ray.cli.init import write_project
from mlops_ray.cluster.running import run_workflow
from mlops_ray.config.locate import open_workspace
from mlops_ray.delivery.reproduction import find_case, prepare
from mlops_ray.errors import ArtifactError, FeatureStoreError, RegistryError, WorkflowError
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.lineage import read_lineage
from mlops_ray.orchestration.load import load_project

__all__ = ["command"]
NAME = "parcels"
CODE = "parcels_again"
AGAIN = ("clean", "training_set", "split", "fit", "evaluate")


@dataclass(frozen=True)
class Trained:
    """A project in a repository whose version 1 was trained with changes that are gone since."""

    folder: Path
    home: Home
    run_id: str


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def trained(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("projects") / NAME
    write_project(folder, NAME, CODE)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    cleaning = folder / CODE / "cleaning.py"
    committed = cleaning.read_text()
    cleaning.write_text(committed.replace("def ", "FACTOR = 3\n\n\ndef ", 1))
    (folder / "notes.txt").write_text("not committed")
    workspace = open_workspace(folder)
    home = Home(folder / ".mlops-ray")
    overrides = [
        "training.epochs=1",
        "training.workers=1",
        "features.sources.orders.args.count=2500",
    ]
    project = load_project(workspace, [*overrides, f"home={home.root}"])
    _, record = run_workflow(workspace, project, overrides)
    assert record.status == "succeeded"
    cleaning.write_text(committed.replace("def ", "FACTOR = 4\n\n\ndef ", 1))
    (folder / "notes.txt").unlink()
    return Trained(folder, home, record.run_id)


@contextmanager
def changed(home: Home, change: Callable[[dict[str, Any]], None], column: str) -> Iterator[None]:
    """Change what the ledger holds of the only run, and put it back."""
    engine = sa.create_engine(home.ledger_url)
    read, write = sa.text(f"select {column} from runs"), sa.text(f"update runs set {column} = :v")
    with engine.begin() as connection:
        before = connection.execute(read).scalar_one()
        value = json.loads(before)
        change(value)
        connection.execute(write, {"v": json.dumps(value)})
    yield
    with engine.begin() as connection:
        connection.execute(write, {"v": before})
    engine.dispose()


@pytest.fixture
def joined(ray_cluster: Any, trained: Trained, command: Any, monkeypatch: Any) -> Any:
    """Run a verb for the project; processes that it starts join the session's Ray."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.get_runtime_context().gcs_address)

    def run(*arguments: str) -> Any:
        return command("-C", str(trained.folder), *arguments)

    return run


def test_the_version_comes_out_again_with_the_code_of_then(trained: Trained, joined: Any) -> None:
    before = git(trained.folder, "status", "--porcelain", "--", CODE)
    outcome = joined("reproduce", f"{NAME}@champion", "--allow-environment")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "with uncommitted changes" in outcome.out
    for step in AGAIN:
        assert f"✓ {step}: " in outcome.out
    assert "identical: weights " in outcome.out
    assert git(trained.folder, "status", "--porcelain", "--", CODE) == before
    assert not list((trained.home.root / "reproductions").iterdir())
    ledger = Ledger(trained.home.ledger_url)
    (event,) = ledger.events(kind="reproduced")
    ledger.close()
    assert (event.run_id, event.step) == (trained.run_id, "register")
    assert event.data["identical"]
    assert event.data["weights"][0] == event.data["weights"][1]
    assert event.data["first_difference"] is None


def test_the_first_step_that_differs_is_shown(
    trained: Trained, joined: Any, tmp_path: Path
) -> None:
    def another_seed(config: dict[str, Any]) -> None:
        config["workflow"]["steps"]["fit"]["with"]["seed"] += 1

    with changed(trained.home, another_seed, "config"):
        outcome = joined(
            "reproduce", f"{NAME}@1", "--allow-environment", "--keep", str(tmp_path / "kept")
        )
    assert outcome.code == 1
    assert "✓ split: " in outcome.out
    assert "✗ fit: " in outcome.out
    assert "not identical: weights " in outcome.out
    first = outcome.out[outcome.out.index("first difference: step fit: ") :]
    assert "weights.safetensors: other bytes" in first
    assert "training.seed: 0 then, 1 now" in first
    kept = (tmp_path / "kept" / "source" / CODE / "cleaning.py").read_text()
    assert "FACTOR = 3" in kept
    assert (tmp_path / "kept" / "source" / "notes.txt").read_text() == "not committed"


def test_another_environment_is_refused(trained: Trained, joined: Any) -> None:
    def another_python(provenance: dict[str, Any]) -> None:
        provenance["python"] = "3.99.0"

    with changed(trained.home, another_python, "provenance"):
        outcome = joined("reproduce", f"{NAME}@1")
    assert outcome.code == 1
    assert "Python: 3.99.0 then" in outcome.out
    assert "--allow-environment" in outcome.err


def test_without_a_commit_the_code_must_be_the_same(trained: Trained, tmp_path: Path) -> None:
    def no_commit(provenance: dict[str, Any]) -> None:
        provenance["commit"] = None

    with changed(trained.home, no_commit, "provenance"):
        case = find_case(trained.home, f"{NAME}@1")
        # FACTOR is reached by nothing, so the code that runs is what it was.
        assert (
            prepare(case, trained.home, tmp_path / "one", trained.folder).folder == trained.folder
        )
        cleaning = trained.folder / CODE / "cleaning.py"
        text = cleaning.read_text()
        cleaning.write_text(text.replace("return ", "FACTOR + 1\n    return ", 1))
        try:
            with pytest.raises(WorkflowError, match="step clean is not what it was") as caught:
                prepare(case, trained.home, tmp_path / "two", trained.folder)
        finally:
            cleaning.write_text(text)
    assert f"{CODE}.cleaning" in caught.value.where


def test_data_that_is_gone_is_said_and_may_be_given(trained: Trained, tmp_path: Path) -> None:
    offline = trained.home.offline(NAME)
    hidden = offline.with_name("hidden")
    case = find_case(trained.home, f"{NAME}@1")
    shutil.copytree(offline, hidden)
    for view in case.run.config["features"]["views"]:
        shutil.rmtree(offline / view)
    try:
        with pytest.raises(FeatureStoreError, match="is gone"):
            prepare(case, trained.home, tmp_path / "one", trained.folder)
        given = find_case(trained.home, f"{NAME}@1", ["training_set"])
        assert given.again == AGAIN[2:]
        prepared = prepare(given, trained.home, tmp_path / "two", trained.folder)
        assert open_artifacts(prepared.home).verify(given.given["training_set"])
    finally:
        shutil.rmtree(offline)
        hidden.rename(offline)


def test_a_package_that_was_tampered_with_is_no_version(trained: Trained) -> None:
    case = find_case(trained.home, f"{NAME}@1")
    assert case.package == "fit"
    assert case.metrics == ("evaluate",)
    assert set(case.given) == {"extract", "materialize"}
    weights = Path(case.version.package) / "weights.safetensors"
    data = weights.read_bytes()
    try:
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ArtifactError, match="no readable model package"):
            find_case(trained.home, f"{NAME}@1")
    finally:
        weights.write_bytes(data)


@pytest.mark.parametrize("step", ["fit", "evaluate"])
def test_what_has_to_come_out_again_cannot_be_given(trained: Trained, step: str) -> None:
    with pytest.raises(WorkflowError, match=f"step {step} is what has to come out again"):
        find_case(trained.home, f"{NAME}@1", [step])


def test_a_step_that_is_not_there_cannot_be_given(trained: Trained) -> None:
    with pytest.raises(WorkflowError, match="no step 'nonsense'"):
        find_case(trained.home, f"{NAME}@1", ["nonsense"])


def test_a_version_that_nothing_is_known_of(trained: Trained) -> None:
    with pytest.raises(RegistryError, match="has no version '9'"):
        find_case(trained.home, f"{NAME}@9")


def test_everything_from_source_to_model_is_above_it(trained: Trained, joined: Any) -> None:
    ledger = Ledger(trained.home.ledger_url)
    graph = read_lineage(ledger)
    ledger.close()
    above = graph.reach([f"model:{NAME}@1"], "up")
    assert f"step:{trained.run_id}/promote" in graph.reach([f"source:{NAME}/orders"], "down")
    steps = ("extract", "materialize", *AGAIN, "register")
    assert {f"step:{trained.run_id}/{step}" for step in steps} <= above
    assert {f"source:{NAME}/orders", f"view:{NAME}/courier_latest@0"} <= above
    shown = joined("lineage", f"{NAME}@1", "--up").out
    assert "source orders" in shown
    found = json.loads(joined("lineage", f"{NAME}@champion", "--json").out)
    assert found["starts"] == [f"model:{NAME}@1"]
    assert {node["id"] for node in found["nodes"]} >= set(above)
    drawn = joined("lineage", "latest", "--svg", "out/lineage.svg")
    assert drawn.code == 0
    assert "courier_history@0" in (trained.folder / "out" / "lineage.svg").read_text()
    (trained.folder / "out" / "lineage.svg").unlink()
