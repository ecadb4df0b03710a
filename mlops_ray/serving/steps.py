"""The steps of serving that need no model's endpoint: scoring a batch, taking in events."""

from __future__ import annotations

from mlops_ray.config.batch import BatchPredict
from mlops_ray.config.features import Features
from mlops_ray.config.serving import Serving
from mlops_ray.metadata.redaction import redacted
from mlops_ray.metadata.types import Endpoint
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.marks import effect, ensure
from mlops_ray.serving.batch.report import BatchResult
from mlops_ray.serving.batch.scoring import score_batch


@effect
def batch_predict(
    context: Context, project: str, features: Features, serving: Serving, batch: BatchPredict
) -> BatchResult:
    """Score rows with a registered model; see ``batch.scoring.score_batch``.

    Raises:
        RegistryError: There is no such model or alias.
        SourceError: There is no input.
        SchemaError: A column is missing or has the wrong type.
        DataError: More rows are rejected than may be.
    """
    from mlops_ray.registry.registry import Registry

    registry = Registry(context.home)
    model = registry.resolve(batch.model)
    weights = dict(serving.graph.members)
    own = weights.pop(batch.model.partition("@")[2], 1.0)
    members = [
        (registry.resolve(f"{model.name}@{alias}"), weight / own)
        for alias, weight in weights.items()
    ]
    result = score_batch(context, project, features, serving, model, batch, members)
    context.reporter.reads("model", f"{model.name}@{model.version}")
    for view, version in result.feature_versions.items():
        context.reporter.reads("view", f"{view}@{version}")
    context.reporter.metric("rows", result.rows)
    context.reporter.metric("rejected_rows", result.rejected)
    if result.psi:
        context.reporter.metric("psi_max", max(result.psi.values()))
    context.reporter.event(
        "batch_prediction", model=model.name, version=model.version, output=redacted(result.output)
    )
    return result


@effect
def maintain_log(context: Context, serving: Serving) -> dict[str, int]:
    """Put the prediction log of all replicas, living and gone, into its tables, and keep these tidy.

    Small files of past days are merged, and days older than ``serving.log.keep`` removed. Replicas do
    the first and the last by themselves; this also does it where none runs any more. Returns how many
    predictions and labels were put into the tables.

    Raises:
        ServingError: Another process compacted the log all the while.
    """
    from mlops_ray.serving.log.compaction import maintain

    done, merged = maintain(context.home.predictions(context.project), serving.log.keep)
    for name, rows in done.rows.items():
        context.reporter.metric(f"{name}_compacted", rows)
    context.reporter.metric("files_merged", merged)
    context.reporter.metric("days_removed", done.days_removed)
    return done.rows


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
