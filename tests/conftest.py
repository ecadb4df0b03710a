"""Fixtures that the whole suite shares: one Ray cluster, a home of its own for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import postgres_server
import pytest
from postgres_server import PostgresServer

from mlops_ray.cluster.connect import prepare_environment
from mlops_ray.config import targets
from mlops_ray.metadata.access import dismiss_writer
from mlops_ray.metadata.home import Home


def pytest_configure() -> None:
    """Ray reads its environment when it is imported, which some test module may do first."""
    prepare_environment()


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One local Ray with the dashboard on, for all tests of the session."""
    os.environ.setdefault("MLOPS_RAY_HOME", str(tmp_path_factory.mktemp("home")))
    import ray

    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=8,
        include_dashboard=True,
        object_store_memory=300 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path.rstrip(os.pathsep)}},
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL server for all tests of the session; each makes a database of its own."""
    yield from postgres_server.serve()


@pytest.fixture(autouse=True)
def allow_list() -> Iterator[None]:
    """A step that was performed in this process leaves no allow-list behind."""
    before = list(targets._ALLOWED)
    yield
    targets.allow(before)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """An empty home. The cluster keeps nothing of it after the test."""
    made = Home(tmp_path / "home")
    yield made
    dismiss_writer(made)


@pytest.fixture
def tiny_project(home: Home) -> Any:
    """The smallest project that the schema accepts; tests replace the parts that they use."""
    from mlops_ray.config.project import Project

    return Project.model_validate(
        {
            "name": "tiny",
            "home": str(home.root),
            "features": {
                "sources": {"events": {"path": "events.csv", "available_at": "at"}},
                "entities": {"thing": {"keys": {"thing": "string"}}},
                "views": {
                    "facts": {
                        "entity": "thing",
                        "source": "events",
                        "event_time": "at",
                        "columns": ["value"],
                    }
                },
                "services": {
                    "all": {
                        "views": ["facts"],
                        "inputs": {"thing": {"dtype": "string"}, "at": {"dtype": "timestamp"}},
                        "time": "at",
                    }
                },
                "labels": {
                    "source": "events",
                    "id": "id",
                    "time": "at",
                    "label": "label",
                    "known_at": "known_at",
                },
            },
            "model": {"_target_": "mlops_ray.training.models.TabularNet"},
            "training": {"service": "all", "split": {"test": "7d", "validation": "7d"}},
            "monitoring": {
                "every": "1d",
                "drift": {"window": "7d"},
                "performance": {"window": "7d"},
            },
            "loop": {"cooldown": "7d"},
            "workflow": {"name": "none", "steps": {}},
        }
    )
