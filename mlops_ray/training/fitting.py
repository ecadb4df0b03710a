"""From a split training set to a model package: encode, train, pack."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.config.features import Features
from mlops_ray.config.training import Model, Training
from mlops_ray.errors import SchemaError, TrainingError
from mlops_ray.metadata.digest import digest_file, digest_json
from mlops_ray.metadata.package import Manifest, write
from mlops_ray.metadata.profile import Reference
from mlops_ray.training.dataset import TableColumns, write_rows
from mlops_ray.training.encoder import Encoder
from mlops_ray.training.loop import Settings, build
from mlops_ray.training.trainer import Trained


@dataclass(frozen=True)
class Prepared:
    """Everything that a training needs, on disk in ``folder`` and here.

    ``digest`` is that of the rows and the settings: equal ones give equal weights.
    """

    folder: Path
    settings: Settings
    features: Features
    encoder: Encoder
    reference: Reference
    train_rows: int
    validation_rows: int
    seen_until: str
    digest: str


def prepare(
    data: pa.Table,
    features: Features,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    training: Training,
    model: Model,
    *,
    seed: int,
    drift_bins: int,
    folder: Path,
) -> Prepared:
    """Fit the encoder and the reference on the training rows and write the encoded rows.

    ``data`` has a column ``split``; ``names`` are the numeric and the categorical features in the
    model's order. ``folder`` is replaced.

    Raises:
        SchemaError: ``data`` lacks a column.
        TrainingError: The model cannot be built or does not run.
    """
    numeric, categorical = names
    labels = features.labels
    _require(data, (*numeric, *categorical, labels.label, labels.time, "split"))
    train = data.filter(pc.equal(data["split"], "train"))
    validation = data.filter(pc.equal(data["split"], "validation"))
    columns = TableColumns(train, numeric + categorical)
    encoder = Encoder.fit(
        TableColumns(train, numeric), TableColumns(train, categorical), clip=training.clip
    )
    arguments = {
        "num_numeric": encoder.spec.num_numeric,
        "cardinalities": encoder.spec.cardinalities,
    }
    settings = Settings(
        model=model.with_arguments(**arguments),
        training=training,
        seed=seed,
        numeric_features=len(numeric),
    )
    check_model(settings.model, encoder)
    shutil.rmtree(folder, ignore_errors=True)
    # The clip is applied batch by batch, so that a search over it needs no other files.
    unclipped = Encoder(encoder.spec.model_copy(update={"clip": float("inf")}))
    newest = pc.max(train[labels.time])
    for name, part in (("train", train), ("validation", validation)):
        ages_s = _ages_s(part, labels.time, newest)
        write_rows(folder / name, part, unclipped, label=labels.label, ages_s=ages_s)
    return Prepared(
        folder=folder,
        settings=settings,
        features=features,
        encoder=encoder,
        reference=Reference.fit(columns, drift_bins),
        train_rows=train.num_rows,
        validation_rows=validation.num_rows,
        seen_until=_newest(train, validation, labels.time),
        digest=_digest(folder, settings, encoder),
    )


def _newest(train: pa.Table, validation: pa.Table, time: str) -> str:
    """Return the newest prediction time that training or the choice of the epoch looked at."""
    newest = max(pc.max(part[time]).as_py() for part in (train, validation) if part.num_rows)
    return str(newest.isoformat())


def pack(prepared: Prepared, trained: Trained, settings: Settings, path: Path) -> Path:
    """Write the model package of a finished training to ``path``."""
    training = settings.training
    labels = prepared.features.labels
    best = trained.history[trained.best_epoch - 1]
    manifest = Manifest(
        model=settings.model,
        encoder=prepared.encoder.spec.model_copy(update={"clip": training.clip}),
        service_name=training.service,
        service=prepared.features.services[training.service],
        label=labels.label,
        time=labels.time,
        training={
            "inputs_digest": prepared.digest,
            "train_rows": prepared.train_rows,
            "validation_rows": prepared.validation_rows,
            "seen_until": prepared.seen_until,
            "seed": settings.seed,
            "best_epoch": trained.best_epoch,
            "validation_log_loss": best["validation_log_loss"],
            "validation_auc": best["validation_auc"],
            "history": trained.history,
            "settings": training.model_dump(mode="json"),
        },
    )
    write(path, manifest, trained.weights, prepared.reference)
    return path


def check_model(model: Model, encoder: Encoder) -> None:
    """Build the model and run two rows through it, so that a mistake shows before workers start.

    Raises:
        TrainingError: It cannot be built, fails, or returns no logits [n].
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = build(model).eval()
        spec = encoder.spec
        numeric = torch.zeros((2, spec.num_numeric))
        codes = torch.zeros((2, len(spec.categorical)), dtype=torch.int64)
        try:
            shape = tuple(module(numeric, codes).shape)
        except Exception as error:
            raise TrainingError(
                f"{model.target} fails on two rows",
                where="model",
                why=f"{type(error).__name__}: {error}",
                fix="forward(x_num float32 [n, k], x_cat int64 [n, c]) must return logits [n]",
            ) from error
    if shape != (2,):
        raise TrainingError(
            f"{model.target} returns shape {shape} for two rows",
            where="model",
            fix="return one logit per row: shape [n]",
        )


def _require(data: pa.Table, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in data.column_names]
    if missing:
        raise SchemaError(
            f"the training set lacks {', '.join(missing[:5])}",
            fix="make it with the steps training_set and split of the same configuration",
        )


def _ages_s(table: pa.Table, time: str, newest: pa.Scalar) -> npt.NDArray[np.float64]:
    instants = table[time].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    latest = newest.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).as_py()
    ages: npt.NDArray[np.float64] = np.maximum(latest - instants, 0) / 1e6
    return ages


def _digest(folder: Path, settings: Settings, encoder: Encoder) -> str:
    files = {str(f.relative_to(folder)): digest_file(f) for f in sorted(folder.rglob("*.npy"))}
    return digest_json(
        {
            "files": files,
            "model": settings.model.model_dump(mode="json"),
            "training": settings.training.model_dump(mode="json"),
            "seed": settings.seed,
            "encoder": encoder.spec,
        }
    )
