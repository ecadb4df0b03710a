"""Rolling out: which registered versions the endpoint serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlops_ray.config.features import Features
from mlops_ray.config.serving import Serving
from mlops_ray.errors import RegistryError, ServingError
from mlops_ray.metadata import package as packages
from mlops_ray.metadata.package import Manifest
from mlops_ray.metadata.types import Endpoint, ModelVersion
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.marks import ensure
from mlops_ray.serving.models.served import ModelSpec


@ensure
def deploy(
    context: Context, project: str, serving: Serving, features: Features, aliases: list[str]
) -> Endpoint:
    """Make the endpoint serve the versions that ``aliases`` of model ``project`` point to.

    The first answers, the others run in its shadow on the same requests. An alias that is not set
    is left out, and that is recorded; only the first must be set.

    Raises:
        RegistryError: The first alias is not set.
        ServingError: The endpoint cannot serve a version. Where it ran, it goes on as before.
    """
    from mlops_ray.serving.deployment.deploy import deploy as serve

    service, models, targets = models_of(context, project, features, aliases)
    endpoint = serve(project, context.home, serving, features, service, models, targets=targets)
    for version in endpoint.versions.values():
        context.reporter.reads("model", f"{project}@{version}")
    context.reporter.writes("deployment", endpoint.name)
    context.reporter.event(
        "deployment", url=endpoint.url, answer=models[0].alias, versions=endpoint.versions
    )
    return endpoint


def models_of(
    context: Context, project: str, features: Features, aliases: Sequence[str]
) -> tuple[str, list[ModelSpec], list[str]]:
    """Return the feature service that the aliased models use, the models, and their classes.

    Raises:
        RegistryError: The first alias is not set.
        ServingError: The models use different services, or one that is not declared.
    """
    versions = resolve(context, project, aliases)
    manifests = {alias: packages.read(Path(v.package)).manifest for alias, v in versions.items()}
    service = _service(features, manifests, next(iter(versions)))
    models = [ModelSpec(alias=a, version=v.version, path=v.package) for a, v in versions.items()]
    return service, models, [manifest.model.target for manifest in manifests.values()]


def resolve(context: Context, model: str, aliases: Sequence[str]) -> dict[str, ModelVersion]:
    """Return the version of each alias that is set, in order; record those that are not.

    Raises:
        RegistryError: The first alias is not set.
    """
    from mlops_ray.registry.registry import Registry

    registry = Registry(context.home)
    found: dict[str, ModelVersion] = {}
    for alias in dict.fromkeys(aliases):
        version = registry.find(f"{model}@{alias}")
        if version is not None:
            found[alias] = version
            continue
        if not found:
            raise RegistryError(
                f"model {model} has no {alias}, so there is nothing to deploy",
                where=f"{model}@{alias}",
                fix="run workflow=train first, or name another alias",
            )
        context.reporter.event("alias_not_set", model=model, alias=alias)
    return found


def _service(features: Features, manifests: dict[str, Manifest], answering: str) -> str:
    """Return the feature service that all models use, as the endpoint looks features up once."""
    service = manifests[answering].service_name
    for alias, manifest in manifests.items():
        if manifest.service_name != service:
            raise ServingError(
                f"{alias} uses feature service {manifest.service_name}, {answering} uses {service}",
                why="models in shadow score the columns that were looked up for the answer",
                fix="deploy them on endpoints of their own",
            )
    if service not in features.services:
        raise ServingError(
            f"{answering} was trained on feature service {service}, which is not declared",
            where="features.services",
            fix=f"declare it, or train on one of {', '.join(features.services)}",
        )
    return service
