"""The one door to MLflow: tracking and registry of a home, safe to open from several processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from mlops_ray.metadata.home import Home


def connect(home: Home) -> Any:
    """Return an ``MlflowClient`` of the home's tracking store and registry.

    The first call in a process imports MLflow (about 3 s); the first call on a home makes its
    database (about 4 s).
    """
    return _connect(home)


@lru_cache(maxsize=8)
def _connect(home: Home) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Two processes that migrate one fresh database at the same time break it.
    with locked(home):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=home.tracking_uri, registry_uri=home.tracking_uri)
        client.search_registered_models(max_results=1)
        return client


def experiment(client: Any, home: Home, name: str) -> str:
    """Return the id of the experiment ``name``, made where it is missing; its artifacts lie in the
    home."""
    found = client.get_experiment_by_name(name)
    if found is None:
        with locked(home):
            found = client.get_experiment_by_name(name)
            if found is None:
                location = str(home.mlflow_artifacts / name)
                return str(client.create_experiment(name, artifact_location=location))
    return str(found.experiment_id)


@contextmanager
def locked(home: Home) -> Iterator[None]:
    """Hold the home's MLflow lock: for what only one process may do at a time. Not reentrant."""
    home.root.mkdir(parents=True, exist_ok=True)
    with (home.root / "mlflow.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
