"""The models that a replica holds: one that answers, others that run in its shadow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlops_ray.errors import ServingError
from mlops_ray.metadata.package import Package
from mlops_ray.metadata.profile import Reference
from mlops_ray.serving.models.served import ModelSpec, ServedModels

Columns = dict[str, NDArray[Any]]


class Scorer(Protocol):
    """What a loaded model can do."""

    def predict(self, columns: Columns) -> NDArray[np.float64]:
        """Return one score in [0, 1] for each row of the feature columns."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that has shown that it can answer."""

    spec: ModelSpec
    scorer: Scorer
    reference: Reference
    reference_digest: str
    features: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ModelSet:
    """The models of one epoch. Replaced as a whole, never changed.

    ``challengers`` are in the order of ``served.challengers``, where their shares are.
    """

    served: ServedModels
    answer: LoadedModel
    shadows: tuple[LoadedModel, ...]
    challengers: tuple[LoadedModel, ...] = ()

    @property
    def all(self) -> tuple[LoadedModel, ...]:
        """All models, the answering one first."""
        return (self.answer, *self.challengers, *self.shadows)

    @property
    def versions(self) -> dict[str, int]:
        """Version by alias, the answering one first."""
        return {model.spec.alias: model.spec.version for model in self.all}

    def shadow_scores(
        self, columns: Columns, scores: NDArray[np.float64]
    ) -> dict[str, NDArray[np.float64]]:
        """Return the scores of each model in shadow, by alias; ``scores`` are the answer's own."""
        return {
            model.spec.alias: (
                scores if model.scorer is self.answer.scorer else model.scorer.predict(columns)
            )
            for model in self.shadows
        }


class ModelLoader:
    """Loads packages; a package that the current models hold already is not loaded again.

    ``features`` are the columns that the endpoint can give to a model: numeric and categorical.
    """

    def __init__(self, numeric: Iterable[str], categorical: Iterable[str]) -> None:
        self._numeric = frozenset(numeric)
        self._categorical = frozenset(categorical)

    def load(self, served: ServedModels, current: ModelSet | None) -> ModelSet:
        """Return the models of ``served``, each verified by a probe prediction.

        Raises:
            ServingError: a package is broken or does not fit the endpoint; names the version.
        """
        held = {} if current is None else {m.spec.path: m for m in current.all}
        for spec in served.all:
            if spec.path not in held:
                held[spec.path] = self._load(spec)
        loaded = [_renamed(held[spec.path], spec) for spec in served.all]
        last = 1 + len(served.challengers)
        return ModelSet(served, loaded[0], tuple(loaded[last:]), tuple(loaded[1:last]))

    def _load(self, spec: ModelSpec) -> LoadedModel:
        from mlops_ray.metadata import package
        from mlops_ray.training.inference import Predictor

        try:
            read = package.read(Path(spec.path))
            model = _loaded(spec, read, Predictor)
            self._probe(model, read)
        except Exception as error:
            raise ServingError(
                f"version {spec.version} ({spec.alias}) cannot be served",
                where=spec.path,
                why=str(error) or type(error).__name__,
                fix="train and register the model again, or move the alias to another version",
            ) from error
        return model

    def _probe(self, model: LoadedModel, read: Package) -> None:
        encoder = read.manifest.encoder
        unknown = (
            set(encoder.numeric) - self._numeric | set(encoder.categorical) - self._categorical
        )
        if unknown:
            raise ValueError(f"it needs features that the endpoint has not: {sorted(unknown)}")
        columns: dict[str, NDArray[Any]] = {name: np.full(1, np.nan) for name in encoder.numeric}
        columns |= {name: np.array([""], dtype=object) for name in encoder.categorical}
        score = model.scorer.predict(columns)
        if score.shape != (1,) or not 0.0 <= score[0] <= 1.0:
            raise ValueError(f"it answers a row of missing values with {score}, not with a score")


def _loaded(spec: ModelSpec, read: Package, scorer: Callable[[Package], Scorer]) -> LoadedModel:
    return LoadedModel(
        spec, scorer(read), read.reference, read.reference.digest, read.manifest.encoder.features
    )


def _renamed(model: LoadedModel, spec: ModelSpec) -> LoadedModel:
    if model.spec == spec:
        return model
    return LoadedModel(spec, model.scorer, model.reference, model.reference_digest, model.features)
