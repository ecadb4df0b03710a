"""Asking the replicas of an endpoint: what they serve, and that they write their logs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mlops_ray.serving.deployment.app import DEPLOYMENT
from mlops_ray.serving.deployment.applications import POLL_S, Config, details, failed, not_ready
from mlops_ray.serving.models.served import ServedModels

_ANSWER_TIMEOUT_S = 10.0

_handles: dict[tuple[str, str], Any] = {}
_lock = threading.Lock()


class RefusedError(Exception):
    """A replica keeps its old models, and says why."""


def ask_all(project: str, method: str, timeout_s: float) -> list[Any]:
    """Call a method of every replica; return the answers."""
    with _handle(project) as handle:
        answers: list[Any] = handle.broadcast(method).results(timeout_s=timeout_s)
    return answers


def ask_one(project: str, timeout_s: float) -> Any:
    """Return what one replica says of itself; where scaling has left none, one is woken up."""
    with _handle(project) as handle:
        return handle.describe.remote().result(timeout_s=timeout_s)


def wait_until_served(project: str, served: ServedModels, timeout_s: float) -> None:
    """Return when all replicas serve the models. Where there are none just now, one is woken up.

    Raises:
        RefusedError: A replica refuses them.
        ServingError: The application failed, or time is up.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    deadline_s = time.monotonic() + timeout_s
    state: Config = {}
    while time.monotonic() < deadline_s:
        state = details()["applications"].get(project, {})
        if state.get("status") == "DEPLOY_FAILED":
            raise failed(f"the endpoint of {project}", state)
        if state.get("status") == "RUNNING":
            try:
                _wake_up(project, state)
                replicas = _ask_running(project, state)
            except (RayError, RayServeException, TimeoutError):
                replicas = []
            if _all_serve(replicas, served):
                return
        time.sleep(POLL_S)
    raise not_ready(f"the endpoint of {project}", state, timeout_s)


def _ask_running(project: str, state: Config) -> list[Any]:
    """Return what all replicas say of themselves. TimeoutError where fewer answer than run."""
    with _handle(project) as handle:
        answers: list[Any] = handle.broadcast("describe").results(timeout_s=_ANSWER_TIMEOUT_S)
        replicas = state["deployments"][DEPLOYMENT]["replicas"]
        running = sum(replica["state"] == "RUNNING" for replica in replicas)
        if len(answers) < running:
            raise TimeoutError(f"{len(answers)} of {running} replicas have answered")
    return answers


def _all_serve(replicas: list[Any], served: ServedModels) -> bool:
    for replica in replicas:
        refused = replica["refused"]
        if refused is not None and refused["epoch"] == served.epoch:
            raise RefusedError(refused["why"])
    return bool(replicas) and all(replica["epoch"] == served.epoch for replica in replicas)


def _wake_up(project: str, state: Config) -> None:
    """Have a replica where scaling has left none: only it can say whether the models are sound."""
    if state["deployments"][DEPLOYMENT]["target_num_replicas"] == 0:
        ask_one(project, _ANSWER_TIMEOUT_S)


@contextmanager
def _handle(project: str) -> Iterator[Any]:
    """Give a handle; one with which a call has failed is not used again.

    Serve's own cache would return it for ever. But a handle can go stale: where the controller was
    gone for a moment, a process may hear of changed replicas no more.

    Raises:
        RayServeException: There is no such endpoint.
    """
    import ray
    from ray import serve
    from ray.serve.handle import DeploymentHandle

    serve.get_app_handle(project)
    # Another connection to Ray may be one to another cluster.
    key = project, ray.get_runtime_context().get_worker_id()
    with _lock:
        handle: Any = _handles.get(key)
        if handle is None:
            handle = DeploymentHandle(DEPLOYMENT, project)
            # In throughput mode Serve would route in the caller's event loop; there is none here.
            handle._init(_run_router_in_separate_loop=True)
            _handles[key] = handle
    try:
        yield handle
    except BaseException:
        with _lock:
            if _handles.get(key) is handle:
                del _handles[key]
        with suppress(Exception):
            handle.shutdown()
        raise
