"""The steps that features offer to workflows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pyarrow as pa

from mlops_ray.config.base import Duration, Instant
from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import expectations, parity
from mlops_ray.features.code import code_digest_of
from mlops_ray.features.definitions import source_of
from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.parity import ParityReport
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.plan import add_columns, make_plan, record
from mlops_ray.features.reproduction import make_training_set
from mlops_ray.features.sources import clean_source, extract_source, find_source
from mlops_ray.features.tables import read_tables
from mlops_ray.metadata.types import FeatureVersions
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.marks import effect, ensure

_RETENTION = timedelta(days=7)


@ensure
def extract(context: Context, features: Features) -> Path:
    """Read all raw rows of every source, with timestamps as ``timestamp[us, UTC]``.

    Returns a folder with one Arrow file for each source. New messages of topics are fetched.

    Raises:
        SourceError: A source cannot be read.
    """
    folder = context.scratch()
    total = 0
    for name in features.sources:
        context.reporter.progress(message=f"reading {name}")
        rows = extract_source(features, name, folder, context.home.events(context.project))
        context.reporter.reads("source", name)
        context.reporter.metric(f"rows_{name}", rows)
        total += rows
    context.reporter.progress(rows=total, message="read")
    return folder


def clean(context: Context, features: Features, raw: Path) -> Path:
    """Apply each source's clean function, then check its expectations.

    Every result is an event ``expectation``, whether it passed or not. Returns a folder with one
    Arrow file for each source.

    Raises:
        SourceError: A clean function failed.
        SchemaError: A column is missing or has the wrong type.
        ExpectationError: Expectations of severity fail do not hold.
    """
    names = list(read_tables(raw))
    folder = context.scratch()
    total = 0
    for name in names:
        context.reporter.progress(message=f"cleaning {name}")
        find_source(features, name)
        cleaned = clean_source(features, name, raw, folder)
        for result in cleaned.results:
            context.reporter.event("expectation", source=name, **asdict(result))
        expectations.enforce(cleaned.results, f"features.sources.{name}")
        context.reporter.metric(f"rows_{name}", cleaned.rows)
        context.reporter.metric(f"rows_dropped_{name}", cleaned.dropped)
        total += cleaned.rows
    context.reporter.progress(rows=total, message="cleaned")
    return folder


@effect
def materialize(
    context: Context,
    features: Features,
    tables: Path,
    until: Instant | None = None,
    advance: bool = True,
) -> FeatureVersions:
    """Apply the definitions and advance every view to ``until``, or as far as its own source goes.

    Rows that a source brings only after that moment, though they were to be known before it, are
    not used: they are counted as metric ``late_source_rows`` and, by view, as events of that name.

    Offline rows are appended, the online store keeps the newest of each entity. It goes on from the
    stored watermarks, so what is stored already is not computed again. A view that is declared anew,
    or whose project code changed, is made anew; what is served changes when all its rows are there.

    Args:
        context: Of the run.
        features: The declarations.
        tables: The folder with the cleaned rows of each source.
        until: Nothing that is known later is used. None: each view goes to the last arrival in its
            source, and one without rows waits for the first. The result then tells the earliest of
            these moments: up to there all of them are complete.
        advance: False leaves the stores alone and returns the versions at which they stand: for a
            retraining beside something else that keeps them fresh.

    Raises:
        FeatureStoreError: A declared change cannot be made, or no source has a row. Those whose
            events come in later need none yet.
    """
    store = open_offline(context, features)
    before = {name: store.version(name) for name in features.views}
    if not advance:
        tell_versions(context, before, before)
        return _versions(features, store, before, until)
    plan = make_plan(features, store)
    plan.enforce()
    add_columns(features, store)
    pipeline = open_pipeline(context, features, tables)
    sources = [source_of(features, name) for name in features.views]
    if until is None and pipeline.newest is None and any(not s.streams for s in sources):
        raise FeatureStoreError(
            "no source has a row that becomes available",
            where="features.sources",
            fix="check the columns that available_at and event_time name",
        )
    moment = until or pipeline.newest
    reached = "features" if moment is None else f"features until {moment:%Y-%m-%d %H:%M}"
    context.reporter.progress(rows=0, message=reached)
    rows = pipeline.advance(until)
    tell_versions(context, before, pipeline.versions)
    record(features, store)
    context.reporter.progress(rows=rows, message=reached)
    context.reporter.metric("rows_written", rows)
    late = pipeline.late_rows()
    context.reporter.metric("late_source_rows", sum(late.values()))
    for name, count in late.items():
        context.reporter.event("late_source_rows", view=name, rows=count)
    for change in plan.changes:
        if change.action not in ("unchanged", "undeclared"):
            context.reporter.event("feature_view_applied", **change.model_dump(mode="json"))
    return _versions(features, store, pipeline.versions, until or pipeline.complete_until, rows)


def tell_versions(context: Context, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Say for lineage which versions of the views were found, and which were made from them."""
    for name, version in before.items():
        if version >= 0:
            context.reporter.reads("view", f"{name}@{version}")
    for name, version in after.items():
        if version != before.get(name, -1):
            context.reporter.writes("view", f"{name}@{version}")


def open_offline(context: Context, features: Features) -> OfflineStore:
    """Return the offline store of the run's project."""
    return OfflineStore(context.home.offline(context.project), features)


def open_pipeline(
    context: Context, features: Features, tables: Mapping[str, pa.Table] | Path
) -> FeaturePipeline:
    """Return the pipeline over a project's stores, at their watermarks."""
    online = open_online(features, context.home.online(context.project), context.project)
    return FeaturePipeline(features, tables, open_offline(context, features), online)


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
    that have no label are left out and counted: metric ``rows_without_label``. The manifest says
    what it was made from, pins those versions, and is named by the event ``training_manifest``.
    """
    store = open_offline(context, features)
    table = read_tables(tables)[features.labels.source]
    made = make_training_set(features, service, table, store, versions, until)
    pinned = {name: pin.version for name, pin in made.manifest.views.items()}
    tell_versions(context, pinned, pinned)
    context.reporter.progress(rows=made.table.num_rows, message="training set")
    context.reporter.metric("rows", made.count.labelled)
    context.reporter.metric("rows_without_label", made.count.unlabelled)
    context.reporter.metric("rows_label_not_known_yet", made.count.unknown)
    context.reporter.param("manifest", made.manifest.id)
    context.reporter.event(
        "training_manifest", id=made.manifest.id, **made.manifest.model_dump(mode="json")
    )
    return made.table


@effect
def compact(context: Context, features: Features) -> dict[str, int]:
    """Merge the small files of every view into buckets by entity; return the tables' versions."""
    store = open_offline(context, features)
    before = {name: store.version(name) for name in features.view_order}
    versions = {}
    for name in features.view_order:
        if before[name] >= 0:
            context.reporter.progress(message=f"compacting {name}")
            versions[name] = store.compact(name)
    tell_versions(context, before, versions)
    return versions


@effect
def vacuum(
    context: Context, features: Features, retention: Duration = _RETENTION
) -> dict[str, int]:
    """Remove the files that no version needs which is pinned, newest or younger than ``retention``.

    Returns how many files went, by view.
    """
    store = open_offline(context, features)
    removed = {
        name: len(store.vacuum(name, retention=retention))
        for name in features.view_order
        if store.version(name) >= 0
    }
    context.reporter.metric("files_removed", sum(removed.values()))
    return removed


@effect
def check_parity(
    context: Context,
    features: Features,
    service: str,
    since: Instant | None = None,
    until: Instant | None = None,
    window: Duration | None = parity.WINDOW,
    tolerance: float = 0.0,
    threshold: float = 0.0,
) -> ParityReport:
    """Compare the features that requests saw online with those of the offline store.

    See ``parity.check_parity``. The report is an event ``parity`` and is shown to Prometheus; its
    field ``breached`` can trigger a further step: ``when: $parity.breached``.
    """
    report = parity.check_parity(
        features,
        service,
        open_offline(context, features),
        context.home.predictions(context.project),
        since=since,
        until=until,
        window=window,
        tolerance=tolerance,
        threshold=threshold,
    )
    parity.export(context.project, report)
    context.reporter.progress(rows=report.rows, message="compared")
    context.reporter.metric("rows_waiting", report.waiting)
    context.reporter.metric("features_different", sum(f.different > 0 for f in report.features))
    context.reporter.metric("features_not_logged", len(report.not_logged))
    context.reporter.event("parity", **report.model_dump(mode="json"))
    return report


@effect
def rebuild_online(context: Context, features: Features) -> dict[str, int]:
    """Fill the online store anew from the offline one, each view at once; return the rows by view.

    Rows that a writer has online and not yet offline are gone until it goes on: it then notices.
    """
    store = open_offline(context, features)
    online = open_online(features, context.home.online(context.project), context.project)
    versions = {name: store.version(name) for name in features.view_order}
    tell_versions(context, versions, versions)
    return {
        name: materialize_view(store, online, name, code_digest_of(features, name), full=True)
        for name in features.view_order
    }


def _versions(
    features: Features,
    store: OfflineStore,
    versions: dict[str, int],
    until: Instant | None,
    rows: int = 0,
) -> FeatureVersions:
    tables = {name: store.table_id(name) for name in features.views}
    return FeatureVersions(versions=versions, tables=tables, until=until, rows_written=rows)
