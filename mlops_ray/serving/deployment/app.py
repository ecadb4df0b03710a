"""The Ray Serve application: what runs in a replica, and the builder that Serve calls by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mlops_ray.config.features import Features
from mlops_ray.config.serving import Serving
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint.endpoint import Endpoint
from mlops_ray.serving.log.sink import MonitorSink
from mlops_ray.serving.models.loading import ModelLoader

IMPORT_PATH = "mlops_ray.serving.deployment.app:build"
DEPLOYMENT = "endpoint"

_DRAIN_TIMEOUT_S = 20.0


class Settings(BaseModel):
    """The arguments of the application, as JSON. ``roots`` are folders with the project's code."""

    project: str
    home: Path
    serving: Serving
    features: Features
    service: str
    roots: tuple[str, ...] = ()


class Replica:
    """What Serve calls in a replica; the work is done by ``Endpoint``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from ray import serve

        wanted = Settings.model_validate(settings)
        _extend_path(wanted.roots)
        self._endpoint = _open(wanted, serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> Endpoint:
        return self._endpoint

    async def reconfigure(self, user_config: Any) -> None:
        """Serve the models of ``user_config``."""
        await self._endpoint.reconfigure(user_config)

    async def flush(self) -> int:
        """Write and send the prediction log."""
        return await self._endpoint.flush()

    async def describe(self) -> dict[str, Any]:
        """Return what this replica serves."""
        return self._endpoint.describe()


def build(args: dict[str, Any]) -> Any:
    """Return the Serve application for ``args`` (see ``Settings``).

    The deployment's configuration names the models. Serve wants a builder with just one parameter.
    """
    return bind(args)


def bind(args: dict[str, Any], user_config: dict[str, Any] | None = None) -> Any:
    """Return the Serve application for ``args`` with the models that ``user_config`` names."""
    from ray import serve

    serving = Settings.model_validate(args).serving
    options: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": serving.max_ongoing_requests,
        "ray_actor_options": {"num_cpus": serving.num_cpus, "num_gpus": serving.num_gpus},
        # With new code, the new replica is up before the old one goes.
        "max_surge_percent": 100,
        # A package that cannot be loaded will not get better by trying.
        "max_constructor_retry_count": 2,
        "graceful_shutdown_timeout_s": _DRAIN_TIMEOUT_S,
        "logging_config": {"enable_access_log": False},
        **_replicas(serving),
    }
    if user_config is not None:
        options["user_config"] = user_config
    deployment: Any = serve.deployment(**options)(serve.ingress()(Replica))
    return deployment.bind(args)


def _replicas(serving: Serving) -> dict[str, Any]:
    scaling = serving.autoscaling
    if scaling.min_replicas == scaling.max_replicas:
        return {"num_replicas": scaling.max_replicas}
    return {"autoscaling_config": scaling.model_dump()}


def _open(settings: Settings, replica: str) -> Endpoint:
    from mlops_ray.features.lookup import OnlineLookup
    from mlops_ray.features.online.nodes import open_near
    from mlops_ray.features.service import feature_columns

    features, service = settings.features, settings.service
    home = Home(settings.home)
    store = open_near(features, home, settings.project)
    return Endpoint(
        settings.project,
        home,
        settings.serving,
        features,
        service,
        lookup=OnlineLookup(features, service, store),
        loader=ModelLoader(*feature_columns(features, service)),
        replica=replica,
        sink=MonitorSink(settings.project),
    )


def _extend_path(roots: Sequence[str]) -> None:
    # A relative root lies in the working directory that Ray unpacked for this process.
    for root in reversed(roots):
        path = os.path.abspath(root)
        if path not in sys.path:
            sys.path.insert(0, path)
