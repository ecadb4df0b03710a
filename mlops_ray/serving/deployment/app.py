"""The Ray Serve application: what runs in a replica, and the builder that Serve calls by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mlops_ray.config import targets
from mlops_ray.config.features import Features
from mlops_ray.config.serving import Placement, Serving
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint.endpoint import Endpoint
from mlops_ray.serving.endpoint.metrics import RaySeries
from mlops_ray.serving.endpoint.swapping import ModelsByName
from mlops_ray.serving.grpc.inference import Inference
from mlops_ray.serving.grpc.methods import InferenceMethods
from mlops_ray.serving.models.loading import ModelLoader

IMPORT_PATH = "mlops_ray.serving.deployment.app:build"
DEPLOYMENT = "endpoint"

_MODEL_DEPLOYMENT = "model-{alias}"

Options = dict[str, Any]


class Settings(BaseModel):
    """The arguments of the application, as JSON: what only new processes can change.

    ``roots`` are folders with the project's code, ``allowed`` the packages that dotted names may point
    into, ``placed`` the aliases that have processes of their own.
    """

    project: str
    home: Path
    serving: Serving
    features: Features
    service: str
    roots: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    placed: dict[str, Placement] = {}


class Replica(InferenceMethods):
    """What Serve calls in a replica; the work is done by ``Endpoint``."""

    def __init__(self, settings: dict[str, Any], remotes: dict[str, Any]) -> None:
        from ray import serve

        wanted = Settings.model_validate(settings)
        extend_path(wanted.roots)
        targets.allow(wanted.allowed)
        replica = serve.get_replica_context().replica_id.unique_id
        self._endpoint = _open(wanted, replica, remotes)
        self._inference = Inference(self._endpoint)

    def __serve_build_asgi_app__(self) -> Endpoint:
        return self._endpoint

    async def reconfigure(self, user_config: Any) -> None:
        """Serve the models of ``user_config``, or those that have taken their place."""
        await self._endpoint.reconfigure(user_config)

    async def adopt(self) -> None:
        """Serve the models that the endpoint was changed to."""
        await self._endpoint.adopt()

    async def check_health(self) -> None:
        """Raise where Serve should put another replica in this one's place."""
        self._endpoint.check()

    async def flush(self) -> int:
        """Write and send the prediction log."""
        return await self._endpoint.flush()

    async def describe(self) -> dict[str, Any]:
        """Return what this replica serves."""
        return self._endpoint.describe() | {"pid": os.getpid()}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what autoscaling goes by, besides the number of requests."""
        return self._endpoint.scaling_stats()


class ModelReplica:
    """What Serve calls where an alias has processes of its own; the work is done by ``ModelServer``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from mlops_ray.serving.models.remote import ModelServer

        extend_path(settings["roots"])
        targets.allow(settings["allowed"])
        self._server = ModelServer(gpu=settings["gpu"])

    async def reconfigure(self, user_config: Any) -> None:
        """Load the packages of ``user_config``."""
        await self._server.reconfigure(user_config)

    async def score(self, path: str, columns: dict[str, Any]) -> Any:
        """Return the scores that the package at ``path`` gives to feature columns."""
        return await self._server.score(path, columns)


def model_deployment(alias: str) -> str:
    """Return the name of the deployment of an alias that has processes of its own."""
    return _MODEL_DEPLOYMENT.format(alias=alias)


def build(args: dict[str, Any]) -> Any:
    """Return the Serve application for ``args`` (see ``Settings``).

    The options of the deployments, and which models they serve, come from Serve's configuration.
    Serve wants a builder with just one parameter.
    """
    return bind(args, {})


def bind(args: dict[str, Any], options: Mapping[str, Options]) -> Any:
    """Return the Serve application for ``args``, its deployments with ``options`` by their names."""
    settings = Settings.model_validate(args)
    from ray import serve

    remotes = {
        alias: _bind_model(settings, alias, placement, options)
        for alias, placement in settings.placed.items()
    }
    made: Any = serve.ingress()(Replica)
    return _deployment(DEPLOYMENT, made, options).bind(args, remotes)


def _bind_model(
    settings: Settings, alias: str, placement: Placement, options: Mapping[str, Options]
) -> Any:
    arguments = {
        "gpu": placement.num_gpus > 0,
        "roots": list(settings.roots),
        "allowed": list(settings.allowed),
    }
    return _deployment(model_deployment(alias), ModelReplica, options).bind(arguments)


def _deployment(name: str, made: Any, options: Mapping[str, Options]) -> Any:
    from ray import serve

    # A package that cannot be loaded will not get better by trying.
    fixed: Options = {"name": name, "max_constructor_retry_count": 2}
    decorate: Any = serve.deployment(**fixed, **options.get(name, {}))
    return decorate(made)


def _open(settings: Settings, replica: str, remotes: dict[str, Any]) -> Endpoint:
    from mlops_ray.features.lookup import OnlineLookup
    from mlops_ray.features.online.nodes import open_near
    from mlops_ray.features.service import feature_columns

    features, service = settings.features, settings.service
    home = Home(settings.home)
    store = open_near(features, home, settings.project)
    loader = ModelLoader(
        *feature_columns(features, service),
        graph=settings.serving.graph,
        gpu=settings.serving.num_gpus > 0,
        remotes=remotes,
    )
    return Endpoint(
        settings.project,
        home,
        settings.serving,
        features,
        service,
        lookup=OnlineLookup(features, service, store),
        loader=loader,
        replica=replica,
        many=_many(settings, home, loader),
        series=RaySeries(),
    )


def _many(settings: Settings, home: Home, loader: ModelLoader) -> ModelsByName | None:
    """Return what gives the models of other registered names, where the endpoint has them."""
    if not settings.serving.many.models:
        return None
    from mlops_ray.registry.registry import Registry
    from mlops_ray.serving.models.many import ManyModels

    return ManyModels(settings.serving.many, Registry(home), loader, settings.service).get


def extend_path(roots: Sequence[str]) -> None:
    """Import from ``roots`` first, in this process."""
    # A relative root lies in the working directory that Ray unpacked for this process.
    for root in reversed(roots):
        path = os.path.abspath(root)
        if path not in sys.path:
            sys.path.insert(0, path)
