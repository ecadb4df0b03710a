"""The steps that features offer to workflows."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa

from mlops_ray.config.base import Instant
from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import expectations
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import LmdbStore
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.sources import clean_source, find_source, read_source
from mlops_ray.features.training_set import build_training_set
from mlops_ray.metadata.types import FeatureVersions
from mlops_ray.orchestration.context import Context


def extract(context: Context, features: Features, source: str) -> pa.Table:
    """Return all raw rows of one source, with timestamps as ``timestamp[us, UTC]``.

    Raises:
        SourceError: The source cannot be read.
    """
    table = read_source(find_source(features, source), f"features.sources.{source}")
    context.reporter.progress(rows=table.num_rows, message=f"read {source}")
    context.reporter.metric("rows", table.num_rows)
    return table


def clean(context: Context, features: Features, source: str, raw: pa.Table) -> pa.Table:
    """Return the rows of a source after its clean function, once its expectations hold.

    Every result is an event ``expectation``, whether it passed or not.

    Raises:
        SourceError: The clean function failed.
        SchemaError: A column is missing or has the wrong type.
        ExpectationError: Expectations of severity fail do not hold.
    """
    where = f"features.sources.{source}"
    declared = find_source(features, source)
    table = clean_source(declared, raw, where)
    results = expectations.evaluate(table, declared.expectations, where)
    for result in results:
        context.reporter.event("expectation", source=source, **asdict(result))
    expectations.enforce(results, where)
    context.reporter.progress(rows=table.num_rows, message=f"cleaned {source}")
    context.reporter.metric("rows", table.num_rows)
    context.reporter.metric("rows_dropped", raw.num_rows - table.num_rows)
    return table


def materialize(
    context: Context,
    features: Features,
    tables: dict[str, pa.Table],
    until: Instant | None = None,
) -> FeatureVersions:
    """Advance every view to ``until`` (None: the last moment at which a source row arrives).

    Offline rows are appended, the online store keeps the newest of each entity. It goes on from the
    stored watermarks, so what is stored already is not computed again.

    Args:
        context: Of the run.
        features: The declarations.
        tables: The cleaned rows of each source that views read, by its name.
        until: Nothing that is known later is used.
    """
    pipeline = open_pipeline(context, features, tables)
    moment = until or pipeline.newest
    if moment is None:
        raise FeatureStoreError(
            "no source has a row that becomes available",
            where="features.sources",
            fix="check the columns that available_at and event_time name",
        )
    context.reporter.progress(rows=0, message=f"features until {moment:%Y-%m-%d %H:%M}")
    rows = pipeline.advance(moment)
    context.reporter.progress(rows=rows, message=f"features until {moment:%Y-%m-%d %H:%M}")
    context.reporter.metric("rows_written", rows)
    return FeatureVersions(versions=pipeline.versions, until=moment, rows_written=rows)


def open_pipeline(
    context: Context, features: Features, tables: dict[str, pa.Table]
) -> FeaturePipeline:
    """Return the pipeline over a project's stores, at their watermarks."""
    offline = OfflineStore(context.home.offline(context.project), features)
    online = LmdbStore(context.home.online(context.project), features)
    return FeaturePipeline(features, tables, offline, online)


def training_set(
    context: Context,
    features: Features,
    service: str,
    table: pa.Table,
    versions: FeatureVersions,
    until: Instant | None = None,
) -> pa.Table:
    """Return the labelled rows known by ``until`` with the service's features as of their times.

    ``table`` holds the cleaned rows of the label source; the views are read at ``versions``. Rows
    that have no label are left out and counted: metric ``rows_without_label``.
    """
    store = OfflineStore(context.home.offline(context.project), features)
    result, count = build_training_set(features, service, table, store, versions.versions, until)
    context.reporter.progress(rows=result.num_rows, message="training set")
    context.reporter.metric("rows", count.labelled)
    context.reporter.metric("rows_without_label", count.unlabelled)
    context.reporter.metric("rows_label_not_known_yet", count.unknown)
    return result
