from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from training.training_samples import features, model, rows, training

from mlops_ray.config.training import Evaluation, Tuning
from mlops_ray.errors import SchemaError, TrainingError
from mlops_ray.metadata import package as packages
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Report
from mlops_ray.orchestration.context import Context, Silent
from mlops_ray.training import steps
from mlops_ray.training.dataset import open_rows
from mlops_ray.training.loop import train
from mlops_ray.training.trainer import trained_from

KILLABLE = "training.training_samples.Killable"
TRAINING = training()


class Recorder(Silent):
    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.messages: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def progress(self, *, rows: int | None = None, message: str = "") -> None:
        self.messages.append(message)

    def metric(self, name: str, value: float) -> None:
        self.metrics[name] = value

    def event(self, kind: str, **data: Any) -> None:
        self.events.append((kind, data))


@pytest.fixture
def context(home: Home) -> Context:
    return Context("tiny", home, "run-1", "fit", Recorder())


@pytest.fixture
def data(context: Context) -> Any:
    return steps.split(context, rows(), TRAINING, features().labels, None)


def fit(context: Context, data: Any, **arguments: Any) -> packages.Package:
    chosen = model(KILLABLE, at_batch=12, dropout=0.0, **arguments)
    path = steps.fit(context, data, features(), TRAINING, chosen, seed=3, drift_bins=10)
    return packages.read(path)


def alone(context: Context, data: Any) -> dict[str, Any]:
    """Return the weights that one process gets with the same global batches."""
    work = steps._Work(context.home.training, "alone")
    chosen = model(dropout=0.0)
    prepared = work.prepare(data, features(), TRAINING, chosen, seed=3, drift_bins=10)
    parts = [open_rows(prepared.folder / name) for name in ("train", "validation")]
    states = [state for _, state in train(prepared.settings, *parts)]
    torch.use_deterministic_algorithms(False)
    return trained_from(states[-1]).weights


def test_a_killed_worker_costs_nothing_but_time(ray_cluster, context, data, tmp_path):
    (tmp_path / "calm").touch()
    calm = fit(context, data, flag=str(tmp_path / "calm"))
    disturbed = fit(context, data, flag=str(tmp_path / "disturbed"))
    assert (tmp_path / "disturbed").exists()
    assert disturbed.weights_digest == calm.weights_digest
    assert disturbed.manifest.training["history"] == calm.manifest.training["history"]
    left = sorted(path.name for path in context.home.training.iterdir())
    assert left == ["run-1-fit-package"]
    for name, weights in alone(context, data).items():
        assert calm.weights[name] == pytest.approx(weights, abs=1e-4)
    report = steps.evaluate(context, calm.path, data, Evaluation(slices=("colour",)))
    assert report.auc > 0.7
    assert report.rows == context.reporter.metrics["test_rows"] == 480
    assert {item.value for item in report.slices} <= {"red", "green", "blue"}
    assert any("epoch 3/3" in message for message in context.reporter.messages)


def test_an_error_of_the_model_is_told_at_once(context, data):
    wrong = model("training.training_samples.TwoLogits")
    with pytest.raises(TrainingError, match=r"returns shape \(2, 2\)"):
        steps.fit(context, data, features(), TRAINING, wrong, seed=0, drift_bins=10)


def finished_trials(context: Context) -> set[str]:
    """Return the trials that have reported all their epochs."""
    logs = context.home.training.glob("*/_trial*/result.json")
    return {log.parent.name for log in logs if len(log.read_text().splitlines()) == 3}


def test_tune_goes_on_where_it_was_cut_off_and_returns_the_best_trial(
    ray_cluster, context, data, tmp_path
):
    space = {
        "training.learning_rate": {"kind": "loguniform", "low": 1e-5, "high": 1e-2},
        "model.dropout": {"kind": "choice", "values": [0.0, 0.2]},
    }
    tuning = Tuning.model_validate(
        {"trials": 4, "concurrent": 1, "grace_epochs": 3, "space": space}
    )
    log = tmp_path / "built"
    counted = model("training.training_samples.Counted", log=str(log))
    silent = Context(context.project, context.home, context.run_id, context.step)

    @ray_cluster.remote(num_cpus=0)
    class First:
        def tune(self) -> None:
            steps.tune(silent, data, features(), TRAINING, counted, tuning, 3, 10)

    first = First.remote()
    first.tune.remote()
    deadline = time.monotonic() + 120
    while len(finished_trials(context)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ray_cluster.kill(first)
    before = finished_trials(context)
    log.unlink()

    path = steps.tune(context, data, features(), TRAINING, counted, tuning, 3, 10)

    # Built once for the check and once for each open trial; the search may not have noted the end
    # of the newest finished one before it was killed.
    assert len(log.read_text().splitlines()) <= 1 + (4 - len(before)) + 1
    package = packages.read(path)
    kind, event = context.reporter.events[-1]
    assert kind == "tuning"
    assert len(event["trials"]) == 4
    best = max(event["trials"], key=lambda trial: trial["best_validation_auc"])
    assert package.manifest.training["validation_auc"] == best["best_validation_auc"]
    chosen = package.manifest.training["settings"]
    assert chosen["learning_rate"] == best["config"]["training.learning_rate"]
    assert package.manifest.model.arguments["dropout"] == best["config"]["model.dropout"]
    assert isinstance(steps.evaluate(context, path, data, Evaluation()), Report)
    assert [p.name for p in context.home.training.iterdir()] == ["run-1-fit-package"]


def test_evaluate_names_what_is_missing(context, data, tmp_path):
    from training.test_training_inference import make

    package = make(tmp_path)
    with pytest.raises(SchemaError, match="carrier"):
        steps.evaluate(context, package.path, data, Evaluation(slices=("carrier",)))
    empty = data.slice(0, 10)
    with pytest.raises(TrainingError, match="no rows"):
        steps.evaluate(context, package.path, empty, Evaluation())


def test_an_alias_that_is_not_set_has_no_report(context, data):
    assert steps.evaluate_alias(context, "tiny", "champion", data, Evaluation()) is None


@pytest.mark.parametrize(("seconds", "has_seen"), [(-1, False), (0, True), (86_400, True)])
def test_a_champion_says_whether_it_has_seen_the_rows(context, data, tmp_path, seconds, has_seen):
    from training.test_training_inference import make

    from mlops_ray.registry.registry import Registry

    made = make(tmp_path / "made")
    since = steps.evaluate(context, made.path, data, Evaluation()).since
    seen = {"seen_until": (since + timedelta(seconds=seconds)).isoformat()}
    manifest = made.manifest.model_copy(update={"training": seen})
    packages.write(tmp_path / "told", manifest, made.weights, made.reference)
    report = steps.evaluate(context, made.path, data, Evaluation())
    Registry(context.home).register("tiny", tmp_path / "told", report, {}, "champion")
    found = steps.evaluate_alias(context, "tiny", "champion", data, Evaluation())
    assert (found.version, found.has_seen) == (1, has_seen)
    assert found.auc == report.auc


def test_outside_a_run_two_fits_do_not_share_files(home: Home):
    adhoc = Context("tiny", home)
    assert steps._Work.of(adhoc).rows != steps._Work.of(adhoc).rows
    named = Context("tiny", home, "run-1", "fit")
    assert steps._Work.of(named).rows == steps._Work.of(named).rows
    assert steps._Work.of(named).storage == Path(home.training)
