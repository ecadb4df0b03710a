"""Deploying, changing, flushing and removing an endpoint on the cluster's Ray Serve.

All goes through Serve's declarative API: there a changed ``user_config`` reaches the running
replicas, while ``serve.run`` would restart them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from mlops_ray.config.features import Features
from mlops_ray.config.serving import Serving
from mlops_ray.errors import ServingError
from mlops_ray.features.service import on_demand_views
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Endpoint
from mlops_ray.serving.deployment import runtime
from mlops_ray.serving.deployment.app import DEPLOYMENT, IMPORT_PATH, Settings
from mlops_ray.serving.deployment.applications import (
    POLL_S,
    READY_TIMEOUT_S,
    Config,
    alone,
    deployed,
    details,
    failed,
    not_ready,
    put,
)
from mlops_ray.serving.deployment.placement import roots_of, runtime_environment
from mlops_ray.serving.models.served import ModelSpec, ServedModels

FLUSH_TIMEOUT_S = 30.0


def deploy(
    project: str,
    home: Home,
    serving: Serving,
    features: Features,
    service: str,
    models: Sequence[ModelSpec],
    *,
    targets: Iterable[str] = (),
    timeout_s: float = READY_TIMEOUT_S,
) -> Endpoint:
    """Make the endpoint of ``project`` serve ``models``: the first answers, those that
    ``serving.routing`` gives a share answer theirs, the others run in shadow.

    Starts Serve where it does not run. An endpoint that runs changes its models in place, without
    dropping a request; changed code or declarations start new replicas before the old ones go.
    Other applications stay. Returns when every replica serves the models. Callers of one home take
    turns, since Serve takes the list of its applications as a whole; those of different homes must
    not deploy at the same time on one cluster.

    Args:
        models: At least one.
        targets: Dotted names of the project's own code that replicas import, besides the service's
            request function: the classes of the models.

    Raises:
        ServingError: A model is refused (the endpoint then goes on with what it served before), the
            application fails, or it is not ready within ``timeout_s``.
    """
    with alone(home):
        return _deploy(project, home, serving, features, service, models, targets, timeout_s)


def _deploy(
    project: str,
    home: Home,
    serving: Serving,
    features: Features,
    service: str,
    models: Sequence[ModelSpec],
    targets: Iterable[str],
    timeout_s: float,
) -> Endpoint:
    runtime.start(serving)
    current = details()
    previous = deployed(current, project)
    roots = roots_of([*_functions(features, service), *targets])
    environment, relative = runtime_environment(roots)
    settings = Settings(
        project=project,
        home=home.root,
        serving=serving,
        features=features,
        service=service,
        roots=tuple(relative),
    )
    before = _served(previous)
    served = ServedModels.of(models, serving.routing, before.epoch if before else 0)
    wanted = _application(settings, environment, _prefix(current, project))
    if previous != _with_models(wanted, served):
        served = served.model_copy(update={"epoch": _new_epoch()})
        put(current, project, _with_models(wanted, served))
    try:
        _wait(project, served, timeout_s)
    except _RefusedError as refusal:
        if previous is not None:
            put(details(), project, previous)
        raise ServingError(
            f"the endpoint of {project} refuses the new models and goes on with the old ones",
            where=", ".join(f"{m.alias}: version {m.version}" for m in models),
            why=str(refusal),
            fix="train again, or move the alias to another version",
        ) from refusal
    return Endpoint(
        name=project, url=runtime.url(serving), versions={m.alias: m.version for m in models}
    )


def flush(endpoint: Endpoint, timeout_s: float = FLUSH_TIMEOUT_S) -> int:
    """Make every replica write its prediction log and report to the monitor.

    Returns when that has happened, with the number of rows and labels that were pending. The monitor
    may call it if it takes deltas in meanwhile.

    Raises:
        ServingError: A replica cannot be reached in time, or cannot write.
    """
    try:
        return sum(_ask_all(endpoint.name, "flush", timeout_s))
    except Exception as error:
        raise ServingError(
            f"the endpoint of {endpoint.name} did not write its prediction log",
            where=endpoint.url,
            why=str(error) or type(error).__name__,
            fix="check that it runs, and the disk's free space",
        ) from error


def remove(project: str) -> bool:
    """Take an endpoint down, after it has answered what it accepted. False where there is none."""
    current = details()
    if deployed(current, project) is None:
        return False
    put(current, project, None)
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while project in details()["applications"]:
        if time.monotonic() > deadline_s:
            raise ServingError(f"the endpoint of {project} does not go away")
        time.sleep(POLL_S)
    return True


class _RefusedError(Exception):
    """A replica keeps its old models, and says why."""


def _functions(features: Features, service: str) -> list[str]:
    return [view.function for view in on_demand_views(features, service)]


def _application(settings: Settings, environment: Config, prefix: str) -> Config:
    return {
        "name": settings.project,
        "route_prefix": prefix,
        "import_path": IMPORT_PATH,
        "runtime_env": environment,
        "args": settings.model_dump(mode="json", by_alias=True),
    }


def _with_models(application: Config, served: ServedModels) -> Config:
    user_config = served.model_dump(mode="json")
    return application | {"deployments": [{"name": DEPLOYMENT, "user_config": user_config}]}


def _served(application: Config | None) -> ServedModels | None:
    deployments = (application or {}).get("deployments") or [{}]
    user_config = deployments[0].get("user_config")
    return ServedModels.parse(user_config) if user_config else None


def _new_epoch() -> int:
    """A number that no earlier deployment has had, refused ones included: the time in ms."""
    return time.time_ns() // 1_000_000


def _prefix(current: Config, project: str) -> str:
    """The first endpoint takes the whole port, so that every error is its own; later ones a part."""
    applications = current["applications"]
    if project in applications:
        return str(applications[project]["route_prefix"])
    taken = {application["route_prefix"] for application in applications.values()}
    return "/" if "/" not in taken else f"/v1/models/{project}"


def _ask_all(project: str, method: str, timeout_s: float) -> list[Any]:
    """Call a method of every replica; return the answers."""
    from ray import serve

    handle: Any = serve.get_app_handle(project)
    if not handle.is_initialized:
        # In throughput mode Serve would route in the caller's event loop, and there is none here.
        handle._init(_run_router_in_separate_loop=True)
    answers: list[Any] = handle.broadcast(method).results(timeout_s=timeout_s)
    return answers


def _wait(project: str, served: ServedModels, timeout_s: float) -> None:
    """Return when all replicas serve the models.

    Raises:
        _RefusedError: A replica refuses them.
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
                replicas = _ask_all(project, "describe", timeout_s=10.0)
            except (RayError, RayServeException, TimeoutError):
                replicas = []
            for replica in replicas:
                refused = replica["refused"]
                if refused is not None and refused["epoch"] == served.epoch:
                    raise _RefusedError(refused["why"])
            if replicas and all(replica["epoch"] == served.epoch for replica in replicas):
                return
        time.sleep(POLL_S)
    raise not_ready(f"the endpoint of {project}", state, timeout_s)
