"""Batch scoring: Parquet in, Parquet with scores out, by Ray Data.

Features are joined from the offline store as of each row's own time, so rows of the past are scored
with what was known then; a row of now gets what the online store would give.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset as datasets

from mlops_ray.config.base import Frozen
from mlops_ray.config.features import Features
from mlops_ray.config.project import BatchPredict
from mlops_ray.errors import DataError, SchemaError, ServingError, SourceError
from mlops_ray.features.join import HeldView
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.service import find_service, inputs_of, on_demand_features, stored_columns
from mlops_ray.metadata.types import ModelVersion
from mlops_ray.orchestration.context import Context
from mlops_ray.serving.deployment.traces import root_cause

SCORE, LABEL, VERSION = "score", "predicted_label", "model_version"


class BatchResult(Frozen):
    """What a batch was scored with. ``feature_versions`` are those of the views' offline tables."""

    rows: int
    output: str
    model: str
    version: int
    feature_versions: dict[str, int]


@dataclass(frozen=True)
class ScoringPlan:
    """All that a worker needs to score rows."""

    features: Features
    service: str
    offline: Path
    versions: Mapping[str, int]
    package: str
    version: int
    threshold: float


class Scorer:
    """Scores tables of a service's inputs; one in each worker."""

    def __init__(self, plan: ScoringPlan) -> None:
        from mlops_ray.metadata import package
        from mlops_ray.training.inference import Predictor

        self._plan = plan
        self._service = find_service(plan.features, plan.service)
        self._on_demand = on_demand_features(plan.features, plan.service)
        store = OfflineStore(plan.offline, plan.features)
        self._views = [
            HeldView(plan.features, view, store, plan.versions[view])
            for view in self._service.views
        ]
        self._predictor = Predictor(package.read(plan.package))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return the rows with score, predicted label and model version.

        Raises:
            SchemaError: An input is missing or has the wrong type.
        """
        if rows.num_rows == 0:
            return _scored(rows, np.empty(0), self._plan)
        columns: dict[str, Any] = {}
        for view in self._views:
            columns |= stored_columns(view.join(rows, self._service.time))
        columns |= self._on_demand(inputs_of(rows, self._service), columns)
        return _scored(rows, self._predictor.predict(columns), self._plan)


def score_batch(
    context: Context,
    project: str,
    features: Features,
    service: str,
    model: ModelVersion,
    batch: BatchPredict,
    threshold: float,
) -> BatchResult:
    """Score ``batch.input`` and put it, whole or not at all, at the folder ``batch.output``.

    The output has the input's rows in their order and its columns, followed by ``score`` (float64),
    ``predicted_label`` (int8) and ``model_version`` (int64). An output that is there is replaced.

    Raises:
        SourceError: There is no input.
        SchemaError: A column is missing or has the wrong type.
        DataError: A null where the input may not have one.
        ServingError: Scoring failed for another reason.
    """
    schema = _input_schema(batch.input)
    _check(schema, features, service, batch.input)
    offline = context.home.offline(project)
    store = OfflineStore(offline, features)
    views = find_service(features, service).views
    versions = {view: store.version(view) for view in views}
    plan = ScoringPlan(
        features, service, offline, versions, model.package, model.version, threshold
    )
    draft = batch.output.with_name(f".{batch.output.name}.{uuid.uuid4().hex[:8]}")
    try:
        _run(plan, batch, draft)
        rows = _count(draft)
        expected = _count(batch.input)
        if rows != expected:
            raise ServingError(f"{rows} rows were scored out of {expected}", where=str(batch.input))
        _replace(draft, batch.output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    context.reporter.progress(rows=rows, message=f"{rows} rows scored")
    return BatchResult(
        rows=rows,
        output=str(batch.output),
        model=model.name,
        version=model.version,
        feature_versions=versions,
    )


def _input_schema(path: Path) -> pa.Schema:
    try:
        return datasets.dataset(path, format="parquet").schema
    except FileNotFoundError as error:
        raise SourceError(
            "there is no such file or folder", where=str(path), fix="set batch.input"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(
            "this is no readable Parquet", where=str(path), why=str(error), fix="set batch.input"
        ) from error


def _check(schema: pa.Schema, features: Features, service: str, path: Path) -> None:
    taken = {SCORE, LABEL, VERSION} & set(schema.names)
    if taken:
        raise SchemaError(
            f"the input has a column {', '.join(sorted(taken))}, which the output adds",
            where=str(path),
            fix="rename it",
        )
    declared = find_service(features, service)
    inputs_of(schema.empty_table(), declared)
    source = datasets.dataset(path, format="parquet")
    for name, field in declared.inputs.items():
        nulls = 0 if field.nullable else source.count_rows(filter=pc.field(name).is_null())
        if nulls:
            raise DataError(
                f"input {name!r} has {nulls} nulls",
                where=str(path),
                fix="leave these rows out, or declare the input nullable",
            )


def _run(plan: ScoringPlan, batch: BatchPredict, draft: Path) -> None:
    import ray
    from ray.exceptions import RayError

    settings = ray.data.DataContext.get_current()
    settings.execution_options.preserve_order = True
    settings.enable_progress_bars = False
    try:
        (
            ray.data.read_parquet(str(batch.input))
            .map_batches(
                Scorer,
                fn_constructor_args=(plan,),
                batch_format="pyarrow",
                batch_size=batch.batch_rows,
                compute=ray.data.ActorPoolStrategy(size=batch.workers),
                num_cpus=1,
            )
            .write_parquet(str(draft))
        )
    except (RayError, RuntimeError) as error:
        raise ServingError(
            "the batch could not be scored",
            where=str(batch.input),
            why=root_cause(str(error)),
            fix="see ray-data among the logs of Ray's session for more",
        ) from error


def _scored(rows: pa.Table, scores: Any, plan: ScoringPlan) -> pa.Table:
    labels = pc.cast(pc.greater_equal(pa.array(scores, pa.float64()), plan.threshold), pa.int8())
    version = pa.array(np.full(rows.num_rows, plan.version, dtype=np.int64))
    return (
        rows.append_column(SCORE, pa.array(scores, pa.float64()))
        .append_column(LABEL, labels)
        .append_column(VERSION, version)
    )


def _count(path: Path) -> int:
    return int(datasets.dataset(path, format="parquet").count_rows())


def _replace(draft: Path, output: Path) -> None:
    """Put the draft in the output's place. A reader sees the old one, the new one, or for a moment
    none; never a mixture."""
    output.parent.mkdir(parents=True, exist_ok=True)
    old = draft.with_name(f"{draft.name}.old")
    if output.exists():
        output.rename(old)
    draft.rename(output)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)
