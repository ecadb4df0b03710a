"""The steps that features offer to workflows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from mlops_ray.config.base import Instant
from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import expectations
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import LmdbStore
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.sources import clean_source, find_source, read_source
from mlops_ray.features.tables import read_tables, write_tables
from mlops_ray.features.training_set import build_training_set
from mlops_ray.metadata.types import FeatureVersions
from mlops_ray.orchestration.context import Context


def extract(context: Context, features: Features) -> Path:
    """Read all raw rows of every source, with timestamps as ``timestamp[us, UTC]``.

    Returns a folder with one Arrow file for each source.

    Raises:
        SourceError: A source cannot be read.
    """
    tables = {}
    for name, source in features.sources.items():
        context.reporter.progress(message=f"reading {name}")
        tables[name] = read_source(source, f"features.sources.{name}")
        context.reporter.metric(f"rows_{name}", tables[name].num_rows)
    context.reporter.progress(rows=_rows(tables), message="read")
    return write_tables(context.scratch(), tables)


def clean(context: Context, features: Features, raw: Path) -> Path:
    """Apply each source's clean function, then check its expectations.

    Every result is an event ``expectation``, whether it passed or not. Returns a folder with one
    Arrow file for each source.

    Raises:
        SourceError: A clean function failed.
        SchemaError: A column is missing or has the wrong type.
        ExpectationError: Expectations of severity fail do not hold.
    """
    tables = {}
    for name, table in read_tables(raw).items():
        context.reporter.progress(message=f"cleaning {name}")
        tables[name] = _clean_one(context, features, name, table)
        context.reporter.metric(f"rows_{name}", tables[name].num_rows)
        context.reporter.metric(f"rows_dropped_{name}", table.num_rows - tables[name].num_rows)
    context.reporter.progress(rows=_rows(tables), message="cleaned")
    return write_tables(context.scratch(), tables)


def _clean_one(context: Context, features: Features, name: str, raw: pa.Table) -> pa.Table:
    where = f"features.sources.{name}"
    declared = find_source(features, name)
    table = clean_source(declared, raw, where)
    results = expectations.evaluate(table, declared.expectations, where)
    for result in results:
        context.reporter.event("expectation", source=name, **asdict(result))
    expectations.enforce(results, where)
    return table


def _rows(tables: dict[str, pa.Table]) -> int:
    return sum(table.num_rows for table in tables.values())


def materialize(
    context: Context,
    features: Features,
    tables: Path,
    until: Instant | None = None,
    advance: bool = True,
) -> FeatureVersions:
    """Advance every view to ``until`` (None: the last moment at which a source row arrives).

    Offline rows are appended, the online store keeps the newest of each entity. It goes on from the
    stored watermarks, so what is stored already is not computed again.

    Args:
        context: Of the run.
        features: The declarations.
        tables: The folder with the cleaned rows of each source.
        until: Nothing that is known later is used.
        advance: False leaves the stores alone and returns the versions at which they stand: for a
            retraining beside something else that keeps them fresh.
    """
    if not advance:
        store = OfflineStore(context.home.offline(context.project), features)
        versions = {name: store.version(name) for name in features.views}
        return FeatureVersions(versions=versions, until=until)
    pipeline = open_pipeline(context, features, read_tables(tables))
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
    tables: Path,
    versions: FeatureVersions,
    until: Instant | None = None,
) -> pa.Table:
    """Return the labelled rows known by ``until`` with the service's features as of their times.

    ``tables`` holds the cleaned rows of the label source; the views are read at ``versions``. Rows
    that have no label are left out and counted: metric ``rows_without_label``.
    """
    store = OfflineStore(context.home.offline(context.project), features)
    table = read_tables(tables)[features.labels.source]
    result, count = build_training_set(features, service, table, store, versions.versions, until)
    context.reporter.progress(rows=result.num_rows, message="training set")
    context.reporter.metric("rows", count.labelled)
    context.reporter.metric("rows_without_label", count.unlabelled)
    context.reporter.metric("rows_label_not_known_yet", count.unknown)
    return result
