"""Deploying, changing, flushing and removing an endpoint on the cluster's Ray Serve.

All goes through Serve's declarative API, but for models that change in running replicas: see
``models.changes``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mlops_ray.config.features import Features
from mlops_ray.config.serving import Serving
from mlops_ray.config.targets import allowed
from mlops_ray.errors import ServingError
from mlops_ray.features.service import on_demand_views
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Endpoint
from mlops_ray.serving.deployment import runtime
from mlops_ray.serving.deployment.app import (
    DEPLOYMENT,
    IMPORT_PATH,
    Settings,
    model_deployment,
)
from mlops_ray.serving.deployment.applications import (
    POLL_S,
    READY_TIMEOUT_S,
    Config,
    alone,
    deployed,
    details,
    put,
)
from mlops_ray.serving.deployment.options import (
    endpoint_options,
    model_options,
    without_options,
)
from mlops_ray.serving.deployment.placement import roots_of, runtime_environment
from mlops_ray.serving.deployment.replicas import RefusedError, ask_all, ask_one, wait_until_served
from mlops_ray.serving.models.changes import Change, Changes
from mlops_ray.serving.models.served import ModelSpec, ServedModels

FLUSH_TIMEOUT_S = 30.0

_LEAST_WAIT_S = 10.0


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
    dropping a request; so it does with shares, limits of scaling, health checks and draining. Changed
    code or other declarations start new replicas before the old ones go. Other applications stay.
    Returns when every replica serves the models. Callers on one cluster take turns, since Serve takes
    the list of its applications as a whole.

    Args:
        models: At least one.
        targets: Dotted names of the project's own code that replicas import, besides what is named in
            the declarations: the classes of the models.

    Raises:
        ServingError: A model is refused (the endpoint then goes on with what it served before), the
            application fails, or it is not ready within ``timeout_s``.
    """
    with alone():
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
    runtime.start(serving, home)
    current = details()
    previous = deployed(current, project)
    roots = roots_of([*_functions(serving, features, service), *targets])
    environment, relative = runtime_environment(roots)
    settings = settings_of(project, home, serving, features, service, models, relative)
    changes = Changes(home, project)
    declared = _declared(previous)
    standing = None if declared is None else changes.read(declared) or Change(served=declared)
    served = ServedModels.of(models, serving.routing, standing.served.epoch if standing else 0)
    application = _application(settings, environment, _prefix(current, project))
    wanted = partial(_configured, application, serving, settings)
    runs = current["applications"].get(project, {}).get("status") == "RUNNING"
    in_place = runs and not settings.placed
    try:
        if in_place and declared and standing and previous == wanted(declared):
            _swap(project, changes, declared, standing, served, timeout_s)
        elif _configure(project, current, wanted, served, timeout_s) and declared:
            changes.forget(declared)
    except RefusedError as refusal:
        raise ServingError(
            f"the endpoint of {project} refuses the new models and goes on with the old ones",
            where=", ".join(f"{m.alias}: version {m.version}" for m in models),
            why=str(refusal),
            fix="train again, or move the alias to another version",
        ) from refusal
    return Endpoint(
        name=project, url=runtime.url(serving), versions={m.alias: m.version for m in models}
    )


def _configure(
    project: str,
    current: Config,
    wanted: Callable[[ServedModels], Config],
    served: ServedModels,
    timeout_s: float,
) -> bool:
    """Have Serve run the application that serves these models; return whether it was changed."""
    previous = deployed(current, project)
    changed = previous != wanted(served)
    if changed:
        served = served.model_copy(update={"epoch": _new_epoch()})
        put(current, project, wanted(served))
    try:
        wait_until_served(project, served, timeout_s)
    except RefusedError:
        if previous is not None:
            put(details(), project, previous)
        raise
    return changed


def _swap(
    project: str,
    changes: Changes,
    declared: ServedModels,
    standing: Change,
    served: ServedModels,
    timeout_s: float,
) -> None:
    """Have the running replicas serve other models; where that fails, those of before."""
    began_s = time.monotonic()
    # A change that never came to its end, as its process was killed, is begun anew.
    is_new = served != standing.served or standing.before is not None
    if is_new:
        served = served.model_copy(update={"epoch": _new_epoch()})
        changes.keep(declared, Change(served=served, before=standing.good))
    try:
        _tell(project, timeout_s)
        left_s = timeout_s - (time.monotonic() - began_s)
        wait_until_served(project, served, max(left_s, _LEAST_WAIT_S))
    except BaseException:
        if is_new:
            changes.keep(declared, Change(served=standing.good))
            _tell(project, timeout_s)
        raise
    if is_new:
        changes.keep(declared, Change(served=served))


def _tell(project: str, timeout_s: float) -> None:
    """Have the replicas look for a change. One that does not hear of it looks by itself, and so does
    one that starts."""
    with suppress(Exception):
        ask_all(project, "adopt", timeout_s)


def settings_of(
    project: str,
    home: Home,
    serving: Serving,
    features: Features,
    service: str,
    models: Sequence[ModelSpec],
    roots: Sequence[str],
) -> Settings:
    """Return the arguments of the application that serves ``models``."""
    placement = serving.routing.placement
    return Settings(
        project=project,
        home=home.root,
        serving=without_options(serving),
        features=features,
        service=service,
        roots=tuple(roots),
        allowed=allowed(),
        placed={m.alias: placement[m.alias] for m in models if m.alias in placement},
    )


def options_of(
    serving: Serving, settings: Settings, served: ServedModels
) -> dict[str, dict[str, Any]]:
    """Return the options of each deployment of the application by its name, as a JSON value."""
    paths = {model.alias: model.path for model in served.all}
    options = {
        DEPLOYMENT: endpoint_options(serving) | {"user_config": served.model_dump(mode="json")}
    }
    for alias, placement in settings.placed.items():
        options[model_deployment(alias)] = model_options(serving, placement) | {
            "user_config": {"paths": [paths[alias]]}
        }
    return options


def flush(endpoint: Endpoint, timeout_s: float = FLUSH_TIMEOUT_S) -> int:
    """Make every replica write its prediction log and report to the monitor.

    Returns when that has happened, with the number of rows and labels that were pending. The monitor
    may call it if it takes deltas in meanwhile.

    Raises:
        ServingError: A replica cannot be reached in time, or cannot write.
    """
    try:
        return sum(ask_all(endpoint.name, "flush", timeout_s))
    except Exception as error:
        raise ServingError(
            f"the endpoint of {endpoint.name} did not write its prediction log",
            where=endpoint.url,
            why=str(error) or type(error).__name__,
            fix="check that it runs, and the disk's free space",
        ) from error


def describe(endpoint: Endpoint, timeout_s: float = FLUSH_TIMEOUT_S) -> dict[str, Any]:
    """Return what the endpoint serves, as its route ``metadata`` does; it needs no token.

    While replicas differ, because new models are on their way, the newest ones are told. Where there are
    no replicas just now, one is woken up.

    Raises:
        ServingError: No replica can be reached in time.
    """
    try:
        answers = ask_all(endpoint.name, "describe", timeout_s) or [
            ask_one(endpoint.name, timeout_s)
        ]
    except Exception as error:
        raise ServingError(
            f"the endpoint of {endpoint.name} does not say what it serves",
            where=endpoint.url,
            why=str(error) or type(error).__name__,
            fix="check that it runs; deploy it with `mlops-ray run workflow=deploy`",
        ) from error
    described: dict[str, Any] = max(answers, key=lambda answer: answer["epoch"] or 0)
    return described


def remove(project: str) -> bool:
    """Take an endpoint down, after it has answered what it accepted. False where there is none."""
    with alone():
        current = details()
        previous = deployed(current, project)
        if previous is None:
            return False
        put(current, project, None)
        _wait_until_gone(project)
        declared = _declared(previous)
        if declared is not None:
            Changes(Home(Path(previous["args"]["home"])), project).forget(declared)
    return True


def _wait_until_gone(project: str) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while project in details()["applications"]:
        if time.monotonic() > deadline_s:
            raise ServingError(f"the endpoint of {project} does not go away")
        time.sleep(POLL_S)


def _functions(serving: Serving, features: Features, service: str) -> list[str]:
    """Return the dotted names of the project's code that Serve imports."""
    policy = [serving.autoscaling.policy] if serving.autoscaling.policy else []
    views = [view.function for view in on_demand_views(features, service)]
    return [*views, *serving.graph.before, *serving.graph.after, *policy]


def _application(settings: Settings, environment: Config, prefix: str) -> Config:
    return {
        "name": settings.project,
        "route_prefix": prefix,
        "import_path": IMPORT_PATH,
        "runtime_env": environment,
        "args": settings.model_dump(mode="json", by_alias=True),
    }


def _configured(
    application: Config, serving: Serving, settings: Settings, served: ServedModels
) -> Config:
    options = options_of(serving, settings, served)
    return application | {"deployments": [{"name": name, **o} for name, o in options.items()]}


def _declared(application: Config | None) -> ServedModels | None:
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
