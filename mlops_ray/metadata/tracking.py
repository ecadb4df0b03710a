"""The one door to MLflow: tracking and registry of a home, safe to open from several processes."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlparse, urlsplit

from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.redaction import redacted

_PATIENCE_S = 3.0
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own are 7 tries of 120 s: a server that is down would hold up a run for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def is_there(home: Home) -> bool:
    """Say whether something can have been written to the home's MLflow, without making one."""
    return home.storage.tracking is not None or (home.root / "mlflow.db").is_file()


def connect(home: Home) -> Any:
    """Return an ``MlflowClient`` of the home's tracking store and registry.

    The first call in a process imports MLflow (about 3 s); the first call on a home makes its
    database (about 4 s). Where MLflow is a server, every call looks whether it is there.

    Raises:
        MlopsRayError: The server cannot be reached, or refuses.
    """
    _require_server(home.tracking_uri)
    return _connect(home)


@lru_cache(maxsize=8)
def _connect(home: Home) -> Any:
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # Two processes that migrate one fresh database at the same time break it.
    with locked(home):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        uri = _without_user(home.tracking_uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        try:
            client.search_registered_models(max_results=1)
        except MlflowException as error:
            raise MlopsRayError(
                "MLflow does not answer as it should",
                where=redacted(home.tracking_uri),
                why=redacted(str(error), home.tracking_uri).partition("\n")[0],
                fix="see its log, or correct MLOPS_RAY_TRACKING; runs are kept in the ledger until "
                "then",
            ) from error
        return client


def _without_user(uri: str) -> str:
    """Return a server's address without user and password, which MLflow then takes from the
    environment: it shows the address in every error.
    """
    server = urlsplit(uri)
    user, at, place = server.netloc.rpartition("@")
    if not at or server.scheme not in ("http", "https"):
        return uri
    name, _, password = user.partition(":")
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(name)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    return server._replace(netloc=place).geturl()


def _require_server(uri: str) -> None:
    server = urlparse(uri)
    if server.scheme not in ("http", "https"):
        return
    try:
        port = server.port or (443 if server.scheme == "https" else 80)
    except ValueError as error:
        raise MlopsRayError(
            "MLOPS_RAY_TRACKING is no address of a server",
            where=redacted(uri),
            why=redacted(str(error), uri),
            fix="write for example http://mlflow:5000; escape what is special in a password (%2F)",
        ) from error
    try:
        socket.create_connection((server.hostname or "", port), timeout=_PATIENCE_S).close()
    except OSError as error:
        raise MlopsRayError(
            "MLflow cannot be reached",
            where=f"{server.scheme}://{server.hostname}:{port}",
            why=str(error),
            fix="start it, or correct MLOPS_RAY_TRACKING; runs are kept in the ledger until then",
        ) from error


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
def locked(home: Home, what: str = "mlflow") -> Iterator[None]:
    """Hold a lock of the home: for what only one process may do at a time. Not reentrant."""
    home.root.mkdir(parents=True, exist_ok=True)
    with (home.root / f"{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
