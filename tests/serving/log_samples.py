"""Answers to log: a small service, models that need no package, and a log in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.features import RequestField
from mlops_ray.config.serving import PredictionLog as Settings
from mlops_ray.metadata.profile import Reference
from mlops_ray.serving.log.encoding import Answered, Part
from mlops_ray.serving.log.prediction_log import PredictionLog
from mlops_ray.serving.models.loading import Columns, LoadedModel, ModelSet
from mlops_ray.serving.models.served import ModelSpec, ServedModels

INPUTS = {
    "customer": RequestField(dtype="string"),
    "shop": RequestField(dtype="int"),
    "at": RequestField(dtype="timestamp"),
}
AT = datetime(2024, 3, 1, 12, tzinfo=UTC)
AT_US = int(AT.timestamp() * 1e6)
REFERENCE = Reference.fit(
    {"amount": np.arange(100.0), "kind": np.array(["a", "b"] * 50, object)}, 4
)


class Fixed:
    """A scorer that says the same of every row."""

    def __init__(self, score: float) -> None:
        self.score = score

    def predict(self, columns: Columns) -> NDArray[np.float64]:
        return np.full(len(columns["amount"]), self.score)


class Broken:
    def predict(self, columns: Columns) -> NDArray[np.float64]:
        raise RuntimeError("no")


def model(alias: str, version: int, scorer: Any) -> LoadedModel:
    spec = ModelSpec(alias=alias, version=version, path=f"/{version}")
    return LoadedModel(spec, scorer, REFERENCE, REFERENCE.digest, ("amount", "kind"))


def model_set(
    answer: LoadedModel,
    shadows: Sequence[LoadedModel] = (),
    challengers: Sequence[LoadedModel] = (),
) -> ModelSet:
    served = ServedModels(answer=answer.spec, shadows=tuple(s.spec for s in shadows))
    return ModelSet(served, answer, tuple(shadows), tuple(challengers))


CHAMPION = model("champion", 1, Fixed(0.5))
ALONE = model_set(CHAMPION)


def answered(
    ids: Sequence[str],
    models: ModelSet = ALONE,
    by: LoadedModel | None = None,
    *,
    times_us: Sequence[int] | None = None,
    amounts: Sequence[float] | None = None,
    latency_us: int = 250,
) -> Answered:
    """Rows answered by ``by``; row i has shop i, amount i and the kinds a, b, None in turn."""
    count = len(ids)
    who = by or models.answer
    times = np.array(times_us or [AT_US + i for i in range(count)], np.int64).view("datetime64[us]")
    kinds = np.empty(count, object)
    kinds[:] = [("a", "b", None)[i % 3] for i in range(count)]
    columns = {"amount": np.array(amounts or range(count), np.float64), "kind": kinds}
    inputs = {
        "customer": np.array([f"customer {i}" for i in range(count)], object),
        "shop": np.arange(count),
        "at": times,
    }
    scores = who.scorer.predict(columns)
    return Answered(
        models,
        [Part(who, None, who.spec.alias)],
        list(ids),
        times,
        scores,
        inputs,
        columns,
        np.full(count, latency_us),
    )


def open_log(folder: Path, replica: str = "r", **settings: Any) -> PredictionLog:
    return PredictionLog(folder, replica, INPUTS, Settings.model_validate(settings))
