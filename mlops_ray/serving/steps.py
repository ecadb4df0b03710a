"""The steps of serving that need no model's endpoint: scoring a batch, taking in events."""

from __future__ import annotations

from pathlib import Path

from mlops_ray.config.features import Features
from mlops_ray.config.project import BatchPredict
from mlops_ray.config.serving import Serving
from mlops_ray.metadata import package as packages
from mlops_ray.metadata.types import Endpoint
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.marks import effect, ensure
from mlops_ray.serving.batch.scoring import BatchResult, score_batch


@effect
def batch_predict(
    context: Context, project: str, features: Features, serving: Serving, batch: BatchPredict
) -> BatchResult:
    """Score Parquet with a registered model; see ``batch.score_batch``.

    Raises:
        RegistryError: There is no such model or alias.
        SourceError: There is no input.
        SchemaError: A column is missing or has the wrong type.
    """
    from mlops_ray.registry.registry import Registry

    model = Registry(context.home).resolve(batch.model)
    manifest = packages.read(Path(model.package)).manifest
    result = score_batch(
        context, project, features, manifest.service_name, model, batch, serving.threshold
    )
    context.reporter.reads("model", f"{model.name}@{model.version}")
    for view, version in result.feature_versions.items():
        context.reporter.reads("view", f"{view}@{version}")
    context.reporter.metric("rows", result.rows)
    context.reporter.event(
        "batch_prediction", model=model.name, version=model.version, output=result.output
    )
    return result


@ensure
def push_endpoint(context: Context, project: str, serving: Serving, features: Features) -> Endpoint:
    """Open the HTTP door of the pushed sources; see ``push.deploy``.

    Raises:
        ServingError: No source is pushed, or the door cannot be opened.
    """
    from mlops_ray.serving.push import deploy

    endpoint = deploy(project, context.home, serving, features)
    context.reporter.writes("deployment", endpoint.name)
    context.reporter.event("push_endpoint", url=endpoint.url)
    return endpoint
