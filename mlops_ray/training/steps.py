"""The steps of training: split, fit, evaluate, tune."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.config.base import Instant
from mlops_ray.config.features import Features, Labels
from mlops_ray.config.training import Evaluation, Model, Training, Tuning
from mlops_ray.errors import SchemaError, TrainingError
from mlops_ray.metadata import package as packages
from mlops_ray.metadata.types import Report
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.marks import effect
from mlops_ray.training import splitting
from mlops_ray.training.dataset import TableColumns

_ADHOC = "adhoc"


def split(
    context: Context,
    data: pa.Table,
    training: Training,
    labels: Labels,
    until: Instant | None = None,
) -> pa.Table:
    """Return the same rows with a column ``split``: train, validation, test or excluded.

    Raises:
        TrainingError: A part has too few rows or only one class.
    """
    table = splitting.split_rows(data, training.split, labels, until)
    for part, rows in splitting.counts(table).items():
        context.reporter.metric(f"{part}_rows", rows)
    return table


def fit(
    context: Context,
    data: pa.Table,
    features: Features,
    training: Training,
    model: Model,
    seed: int,
    drift_bins: int,
) -> Path:
    """Train by Ray Train on the rows of train, choose the epoch on validation; return the package.

    The same inputs give the same package, bit for bit.

    Raises:
        TrainingError: The model cannot be built or trained.
    """
    from mlops_ray.training.trainer import train_on_ray

    work = _Work.of(context)
    prepared = work.prepare(data, features, training, model, seed, drift_bins)
    context.reporter.param("model", model.target)
    context.reporter.param("inputs_digest", prepared.digest)
    context.reporter.progress(rows=0, message=f"starting {training.workers} workers")
    trained = train_on_ray(
        prepared.settings,
        work.rows,
        storage=work.storage,
        name=f"{work.name}-{prepared.digest[:12]}",
        listener=_listener(context, training.epochs),
    )
    return work.finish(prepared, trained, prepared.settings)


def evaluate(context: Context, package: Path, data: pa.Table, evaluation: Evaluation) -> Report:
    """Measure a package on the rows whose split is test.

    Raises:
        TrainingError: There are no such rows, or not of both classes.
        SchemaError: A column of a slice is missing.
    """
    report = _evaluate(package, data, evaluation)
    for name in ("auc", "log_loss", "calibration_error"):
        context.reporter.metric(f"test_{name}", getattr(report, name))
    context.reporter.metric("test_rows", report.rows)
    return report


@effect
def evaluate_alias(
    context: Context, model_name: str, alias: str, data: pa.Table, evaluation: Evaluation
) -> Report | None:
    """Measure a registered version on the rows whose split is test; None where there is none."""
    from mlops_ray.registry.registry import Registry

    version = Registry(context.home).find(f"{model_name}@{alias}")
    if version is None:
        return None
    context.reporter.reads("model", f"{version.name}@{version.version}")
    report = evaluate(context, Path(version.package), data, evaluation)
    seen_until = packages.read(Path(version.package)).manifest.training.get("seen_until")
    has_seen = bool(
        seen_until and report.since and datetime.fromisoformat(seen_until) >= report.since
    )
    return report.model_copy(update={"version": version.version, "has_seen": has_seen})


def tune(
    context: Context,
    data: pa.Table,
    features: Features,
    training: Training,
    model: Model,
    tuning: Tuning,
    seed: int,
    drift_bins: int,
) -> Path:
    """Search ``tuning.space`` by Ray Tune; return the winner's package.

    Raises:
        TrainingError: The space is wrong, or no trial finished.
    """
    from mlops_ray.metadata.digest import digest_json
    from mlops_ray.training.tuning import search

    work = _Work.of(context)
    prepared = work.prepare(data, features, training, model, seed, drift_bins)
    context.reporter.progress(rows=0, message=f"{tuning.trials} trials")
    settings, trained, trials = search(
        prepared.settings,
        work.rows,
        tuning,
        storage=work.storage,
        name=f"{work.name}-{digest_json([prepared.digest, tuning])[:12]}",
    )
    context.reporter.metric("trials", len(trials))
    context.reporter.event(
        "tuning", trials=trials, winner=settings.training.model_dump(mode="json")
    )
    return work.finish(prepared, trained, settings)


@dataclass(frozen=True)
class _Work:
    """Where one attempt at a training keeps its files below the home."""

    storage: Path
    name: str

    @classmethod
    def of(cls, context: Context) -> _Work:
        # Outside a run nothing is resumed, and two calls must not share their files.
        unique = f"-{secrets.token_hex(4)}" if context.run_id == _ADHOC else ""
        return cls(context.home.training, f"{context.run_id}-{context.step}{unique}")

    @property
    def rows(self) -> Path:
        return self.storage / f"{self.name}-rows"

    def prepare(
        self,
        data: pa.Table,
        features: Features,
        training: Training,
        model: Model,
        seed: int,
        drift_bins: int,
    ) -> Any:
        from mlops_ray.features.service import feature_columns
        from mlops_ray.training.fitting import prepare

        numeric, categorical = feature_columns(features, training.service)
        return prepare(
            data,
            features,
            (tuple(numeric), tuple(categorical)),
            training,
            model,
            seed=seed,
            drift_bins=drift_bins,
            folder=self.rows,
        )

    def finish(self, prepared: Any, trained: Any, settings: Any) -> Path:
        from mlops_ray.training.fitting import pack

        path = pack(prepared, trained, settings, self.storage / f"{self.name}-package")
        shutil.rmtree(self.rows, ignore_errors=True)
        return path


def _evaluate(package: Path, data: pa.Table, evaluation: Evaluation) -> Report:
    from mlops_ray.training.evaluation import evaluate as measure
    from mlops_ray.training.inference import Predictor

    content = packages.read(package)
    test = data.filter(pc.equal(data["split"], "test"))
    if test.num_rows == 0:
        raise TrainingError(
            "there are no rows to judge the model on", fix="widen training.split.test"
        )
    missing = [name for name in evaluation.slices if name not in test.column_names]
    if missing:
        raise SchemaError(
            f"the training set has no column {missing[0]!r} to slice by",
            where="evaluation.slices",
            fix=f"columns: {', '.join(test.column_names)}",
        )
    columns = TableColumns(test)
    times = test[content.manifest.time]
    return measure(
        columns[content.manifest.label],
        Predictor(content).predict(columns),
        evaluation,
        {name: columns[name] for name in evaluation.slices},
        since=pc.min(times).as_py(),
        until=pc.max(times).as_py(),
    )


def _listener(context: Context, epochs: int) -> Callable[[dict[str, Any]], None]:
    def listen(epoch: dict[str, Any]) -> None:
        number = int(epoch["epoch"])
        context.reporter.progress(
            rows=int(epoch["rows"]) * number,
            message=f"epoch {number}/{epochs} · validation AUC {epoch['validation_auc']:.4f}",
        )
        for name in ("train_loss", "validation_log_loss", "validation_auc"):
            context.reporter.metric(name, epoch[name])

    return listen
