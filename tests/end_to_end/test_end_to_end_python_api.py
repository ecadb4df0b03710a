"""The Python door: a new project, trained through ``mlops_ray.connect`` on the session's Ray."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import mlops_ray
from mlops_ray.cli.init import write_project
from mlops_ray.features.tables import read_tables


def test_connect_runs_a_workflow_and_gives_its_outputs(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tmp_path / "parcels", "parcels", "parcels_code")
    monkeypatch.setenv("MLOPS_RAY_HOME", str(tmp_path / "home"))
    session = mlops_ray.connect(directory=tmp_path / "parcels")
    run = session.run("features")
    assert run.record.status == "succeeded"
    assert sorted(run.outputs) == ["clean", "extract", "materialize"]
    versions = run.outputs["materialize"]["versions"]
    assert set(versions) == set(session.project.features.views)
    assert session.run("features").run_id != run.run_id


def test_the_feature_store_through_the_python_door(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tmp_path / "parcels", "parcels", "parcels_code")
    monkeypatch.setenv("MLOPS_RAY_HOME", str(tmp_path / "home"))
    few = "features.sources.orders.args.count=600"
    session = mlops_ray.connect(few, directory=tmp_path / "parcels")
    features = session.features
    assert {change.action for change in features.plan().changes} == {"new"}
    assert features.apply().rows_due
    assert features.plan().empty
    before = features.scan("courier_latest").count()
    assert before == features.statistics("courier_latest").rows > 100
    moment = datetime(2024, 2, 15, tzinfo=UTC)
    key = {"courier": "courier_03"}
    (online,) = features.get("courier_latest", key, moment)
    (offline,) = features.get("courier_latest", key, moment, offline=True)
    assert online.status == "present"
    assert online.value == offline.value
    versions = features.materialize(until=datetime(2024, 3, 1, tzinfo=UTC))
    assert versions.until == datetime(2024, 3, 1, tzinfo=UTC)
    assert features.scan("courier_latest").count() > before
    since = datetime(2024, 2, 20, tzinfo=UTC)
    recent = features.scan("courier_latest", since=since).to_pandas()
    assert 0 < len(recent) < before
    assert recent["event_time"].min() >= since
    orders = read_tables(session.run("features").outputs["clean"])["orders"]
    made = features.training_set("delivery", orders, until=moment)
    assert made.table.num_rows == made.count.labelled > 100
    assert "courier_latest__delay_hours" in made.table.column_names


def test_a_mistake_is_a_config_error_with_its_problems(tmp_path: Path) -> None:
    write_project(tmp_path / "parcels", "parcels", "parcels_code")
    with pytest.raises(mlops_ray.ConfigError) as caught:
        mlops_ray.connect("training.epohcs=1", directory=tmp_path / "parcels")
    assert caught.value.problems[0].path == "training.epohcs"
