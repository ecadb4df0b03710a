"""The MLflow mirror: MLflow's own client sees every run once, whatever was killed or down."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from faults import kill_mirror
from hypothesis import given
from hypothesis import strategies as st
from metadata.mirror_world import NOON, add_run, check

from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata import mirror as mirroring
from mlops_ray.metadata import tracking
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.mirror import mirror
from mlops_ray.metadata.records import NewKey, StepChange
from mlops_ray.metadata.tracking_view import _fit


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of an MLflow that nothing was written to, which takes long to make."""
    home = Home(tmp_path_factory.mktemp("fresh"))
    tracking.connect(home)
    return home.root / "mlflow.db"


@pytest.fixture
def client(home: Home, fresh: Path) -> Any:
    home.root.mkdir()
    shutil.copy(fresh, home.root)
    return tracking.connect(home)


def test_everything_is_there_once(home: Home, client: Any) -> None:
    for number in range(3):
        add_run(home, number)
    assert mirror(home) == 3
    assert check(home) == 21
    assert mirror(home) == 0


def test_what_a_person_looks_for_is_shown(home: Home, client: Any) -> None:
    run_id = add_run(home, 0)
    mirror(home)
    experiment = client.get_experiment_by_name("shop").experiment_id
    found = {run.info.run_name: run for run in client.search_runs([experiment])}
    parent, first = found[f"train {run_id}"], found["step0"]
    assert parent.data.tags["mlflow.source.git.commit"] == "abc"
    assert parent.data.tags["mlflow.user"] == "ada"
    assert parent.data.tags["mlops_ray.reason"] == "trigger nightly"
    assert parent.data.metrics["steps"] == 6
    config = Path(client.download_artifacts(parent.info.run_id, "config.json"))
    assert '"width": 64' in config.read_text()
    assert first.data.tags["mlops_ray.reads"] == "view:weather@14"
    assert first.data.tags["mlops_ray.writes"] == "model:shop@1"
    assert first.data.tags["mlops_ray.log"].endswith(f"runs/{run_id}/logs/step0.log")
    assert first.data.metrics["items"] == 3
    assert first.data.metrics["items_cached"] == 1
    assert first.data.metrics["duration_s"] > 0
    dataset = first.inputs.dataset_inputs[0].dataset
    assert dataset.name == "step0"
    assert '"name": "n", "type": "long"' in dataset.schema
    assert dataset.profile == '{"num_rows": 3}'


def test_a_run_that_was_resumed_is_shown_as_it_is_now(home: Home, client: Any) -> None:
    run_id = add_run(home, 1)
    mirror(home)
    ledger = Ledger(home.ledger_url)
    ledger.resume_run(run_id, "host:9:9", {"commit": "def", "seed": 3})
    changed = {"status": "succeeded", "params": {"note": "other"}, "attempt": 9, "ended_at": NOON}
    for name in ("step1", "step4"):
        ledger.apply([StepChange(run_id=run_id, name=name, values=changed)])
    ledger.finish_run(run_id, "succeeded")
    assert mirror(home) == 1
    assert check(home) == 7


def test_a_run_that_is_resumed_while_it_is_mirrored_is_mirrored_again(
    home: Home, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = add_run(home, 1)
    ledger = Ledger(home.ledger_url)
    plain = mirroring._Mirror.write

    def write(self: Any, run: Any) -> None:
        plain(self, run)
        ledger.resume_run(run_id, "host:9:9", {"commit": "def", "seed": 3})
        ledger.finish_run(run_id, "cancelled")

    monkeypatch.setattr(mirroring._Mirror, "write", write)
    assert mirror(home) == 1
    monkeypatch.undo()
    assert mirror(home) == 1
    assert check(home) == 7
    assert mirror(home) == 0


def test_one_run_that_mlflow_refuses_does_not_hold_up_others(
    home: Home, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    refused, good = add_run(home, 1), add_run(home, 2)
    plain = mirroring._Mirror.write

    def write(self: Any, run: Any) -> None:
        if run.run_id == refused:
            raise MlflowException.invalid_parameter_value("no")
        plain(self, run)

    monkeypatch.setattr(mirroring._Mirror, "write", write)
    with pytest.raises(MlflowException, match="no"):
        mirror(home)
    ledger = Ledger(home.ledger_url)
    assert [run.run_id for run in ledger.unmirrored()] == [refused]
    assert [e.run_id for e in ledger.events(kind="mirrored")] == [good]
    monkeypatch.undo()
    assert mirror(home) == 1
    assert check(home) == 14


@given(st.text(max_size=300) | st.text("./ a", max_size=12))
def test_every_name_is_made_into_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric, _validate_param

    fit = _fit(name)
    _validate_metric(fit, 1.0, 0, 0)
    _validate_param(fit, "1")
    assert _fit(fit) == fit


def test_names_that_are_good_stay() -> None:
    assert [_fit(name) for name in ("loss/train", "a.b: c-d_e", "loss//train", "../x", "")] == [
        "loss/train",
        "a.b: c-d_e",
        "loss/train",
        "__/x",
        "_",
    ]


def test_datasets_are_those_that_the_step_read_under_whatever_name(home: Home, client: Any) -> None:
    run_id = add_run(home, 0, steps=2)
    ledger, artifacts = Ledger(home.ledger_url), open_artifacts(home)
    other = artifacts.put(pa.table({"other": [1]}))
    read = ledger.steps(run_id)[0].output
    assert read is not None
    parts = {"inputs": {"data": {"step": "step2", "digest": read.digest}}}
    ledger.apply(
        [
            StepChange(
                run_id=run_id, name="step2", values={"status": "succeeded", "output": other}
            ),
            StepChange(run_id=run_id, name="step1", values={"status": "succeeded", "key": "k"}),
            NewKey(key="k", parts=parts),
        ]
    )
    mirror(home)
    experiment = client.get_experiment_by_name("shop").experiment_id
    found = {run.info.run_name: run for run in client.search_runs([experiment])}
    names = {
        given.dataset.name
        for given in found["step1"].inputs.dataset_inputs
        if given.tags[0].value == "input"
    }
    assert names == {"step0"}


def test_it_goes_on_from_wherever_it_was_cut_off(
    home: Home, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0
    cut = type("Cut", (BaseException,), {})

    class Cutting:
        def __getattr__(self, name: str) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise cut
            return getattr(client, name)

    monkeypatch.setattr(tracking, "connect", lambda home: Cutting())
    for number, calls in enumerate(range(1, 20)):
        add_run(home, number, steps=3)
        left = calls
        with pytest.raises(cut):
            mirror(home)
        left = -1
        assert mirror(home) == 1
    assert check(home) == 19 * 4


def test_what_a_killed_process_still_got_through_is_removed(home: Home, client: Any) -> None:
    run_id = add_run(home, 3)
    experiment = tracking.experiment(client, home, "shop")
    real = client.create_run
    late: list[Any] = []

    def create_run(*given: Any, **more: Any) -> Any:
        # The request of a process that was killed reaches the server after our search.
        late.append(real(*given, **more))
        return real(*given, **more)

    client.create_run = create_run
    try:
        mirror(home)
    finally:
        del client.create_run
    assert len(late) == 7
    assert check(home) == 7
    assert len(client.search_runs([experiment], f"tags.`mlops_ray.run_id` = '{run_id}'")) == 7


def test_a_server_that_is_down_is_said_at_once(home: Home) -> None:
    add_run(home, 0)
    away = Home(home.root, Storage(tracking="http://127.0.0.1:9"))
    with pytest.raises(MlopsRayError, match=r"127.0.0.1:9: MLflow cannot be reached"):
        mirror(away)


def test_kills_and_outages_of_a_server_leave_no_doubles(tmp_path: Path) -> None:
    said = kill_mirror.run(tmp_path, kills=2, seed=10)
    assert "'mirror': 1, 'server': 1" in said
    assert "once each" in said
