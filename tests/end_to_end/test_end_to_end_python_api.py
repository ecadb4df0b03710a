"""The Python door: a new project, trained through ``mlops_ray.connect`` on the session's Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mlops_ray
from mlops_ray.cli.init import write_project


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


def test_a_mistake_is_a_config_error_with_its_problems(tmp_path: Path) -> None:
    write_project(tmp_path / "parcels", "parcels", "parcels_code")
    with pytest.raises(mlops_ray.ConfigError) as caught:
        mlops_ray.connect("training.epohcs=1", directory=tmp_path / "parcels")
    assert caught.value.problems[0].path == "training.epohcs"
