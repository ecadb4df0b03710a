"""The models that a replica holds: one that answers, challengers, and others in their shadow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlops_ray.config.serving import Graph
from mlops_ray.errors import ServingError
from mlops_ray.metadata.package import EncoderSpec, Package
from mlops_ray.metadata.profile import Reference
from mlops_ray.serving.models.explanation import Explainer, Explanation, Value, baseline_of
from mlops_ray.serving.models.graph import AsyncGraphScorer, GraphFunctions, GraphScorer
from mlops_ray.serving.models.remote import RemoteScorer
from mlops_ray.serving.models.scorer import AsyncScorer, Columns, Scorer
from mlops_ray.serving.models.served import ModelSpec, ServedModels

__all__ = ["Columns", "LoadedModel", "ModelLoader", "ModelSet", "Scorer"]

REMOTE = "remote"

Place = tuple[str, str]
"""Path of a package, and the alias whose processes hold it; "" is this process."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that has shown that it can answer.

    ``service`` is the feature service that it was trained on. ``form`` is what it runs as:
    ``eager``, ``torchscript``, ``onnx``, or ``remote`` in a process of its own. ``baseline`` is what
    its scores are explained against.
    """

    spec: ModelSpec
    scorer: Scorer
    reference: Reference
    reference_digest: str
    features: tuple[str, ...]
    service: str = ""
    form: str = "eager"
    baseline: Mapping[str, Value] = field(default_factory=dict)

    @cached_property
    def remote(self) -> bool:
        """Whether its scorer is an ``AsyncScorer``, whose scores are awaited."""
        return isinstance(self.scorer, AsyncScorer)

    def explain(self, columns: Columns) -> Explanation:
        """Explain the scores of rows of feature columns; may take seconds, so it is for threads.

        Raises:
            RequestError: 413, too many rows for one call.
        """
        return self._explainer.explain(columns)

    @cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self.scorer.predict, self.baseline)


@dataclass(frozen=True, eq=False)
class ModelSet:
    """The models of one epoch. Replaced as a whole, never changed.

    ``challengers`` are in the order of ``served.challengers``, where their shares are. ``packages``
    are the models without the graph around them. ``name`` is what they are registered as, where they
    are not the endpoint's own.
    """

    served: ServedModels
    answer: LoadedModel
    shadows: tuple[LoadedModel, ...]
    challengers: tuple[LoadedModel, ...] = ()
    packages: Mapping[Place, LoadedModel] = field(default_factory=dict)
    name: str | None = None

    @property
    def all(self) -> tuple[LoadedModel, ...]:
        """All models, the answering one first."""
        return (self.answer, *self.challengers, *self.shadows)

    @property
    def versions(self) -> dict[str, int]:
        """Version by alias, the answering one first."""
        return {model.spec.alias: model.spec.version for model in self.all}

    @property
    def forms(self) -> dict[str, str]:
        """What each model runs as, by alias."""
        return {model.spec.alias: model.form for model in self.all}


class ModelLoader:
    """Loads packages; a package that the current models hold already is not loaded again.

    Args:
        numeric: The numeric columns that the endpoint can give to a model.
        categorical: The categorical ones.
        graph: What is done around the models: its functions around each, its members with the answer.
        gpu: Run models on the GPU, where there is one.
        remotes: Handles of the deployments that hold the model of an alias (see ``remote``).

    Raises:
        MlopsRayError: A function of the graph is not on the allow-list or cannot be imported.
    """

    def __init__(
        self,
        numeric: Iterable[str],
        categorical: Iterable[str],
        *,
        graph: Graph | None = None,
        gpu: bool = False,
        remotes: Mapping[str, Any] | None = None,
    ) -> None:
        self._numeric = frozenset(numeric)
        self._categorical = frozenset(categorical)
        self._graph = graph or Graph()
        self._functions = GraphFunctions(self._graph)
        self._gpu = gpu
        self._remotes = dict(remotes or {})

    def alone(self) -> ModelLoader:
        """Return a loader for models that have nothing to do with the endpoint's own: in this process,
        and without members of the graph."""
        graph = self._graph.model_copy(update={"members": {}})
        return ModelLoader(self._numeric, self._categorical, graph=graph, gpu=self._gpu)

    def load(self, served: ServedModels, current: ModelSet | None) -> ModelSet:
        """Return the models of ``served``, each verified by a probe prediction.

        Raises:
            ServingError: a package is broken or does not fit the endpoint; names the version. Or a
                member of the graph is not served, or the graph cannot score.
        """
        held = {} if current is None else current.packages
        offered = self._offered
        packages: dict[Place, LoadedModel] = {}
        for spec in served.all:
            place = self._place(spec)
            if place not in packages:
                packages[place] = held.get(place) or self._load(spec, *offered)
        by_alias = {s.alias: replace(packages[self._place(s)], spec=s) for s in served.all}
        loaded = self._surround([by_alias[spec.alias] for spec in served.all])
        last = 1 + len(served.challengers)
        return ModelSet(served, loaded[0], tuple(loaded[last:]), tuple(loaded[1:last]), packages)

    @cached_property
    def _offered(self) -> tuple[frozenset[str], frozenset[str]]:
        """The numeric and categorical columns that models get: those of the graph's functions."""
        if not self._functions:
            return self._numeric, self._categorical
        try:
            found = self._functions.prepare(_missing_rows(self._numeric, self._categorical, 2))
        except Exception as error:
            raise _graph_error(error) from error
        texts = {name for name, values in found.items() if np.asarray(values).dtype.kind in "OSU"}
        return frozenset(found) - texts, frozenset(texts)

    def _place(self, spec: ModelSpec) -> Place:
        return spec.path, spec.alias if spec.alias in self._remotes else ""

    def _load(
        self, spec: ModelSpec, numeric: frozenset[str], categorical: frozenset[str]
    ) -> LoadedModel:
        from mlops_ray.metadata import package

        try:
            read = package.read(Path(spec.path))
            encoder, reference = read.manifest.encoder, read.reference
            _check_fit(encoder, numeric, categorical)
            scorer, form = self._scorer(spec, read)
            _check_scores(scorer, encoder.numeric, encoder.categorical)
        except Exception as error:
            raise ServingError(
                f"version {spec.version} ({spec.alias}) cannot be served",
                where=spec.path,
                why=str(error) or type(error).__name__,
                fix="train and register the model again, or move the alias to another version",
            ) from error
        return LoadedModel(
            spec,
            scorer,
            reference,
            reference.digest,
            encoder.features,
            read.manifest.service_name,
            form,
            baseline_of(encoder, reference),
        )

    def _scorer(self, spec: ModelSpec, read: Package) -> tuple[Scorer, str]:
        from mlops_ray.training.inference import Predictor

        if spec.alias in self._remotes:
            features = read.manifest.encoder.features
            return RemoteScorer(self._remotes[spec.alias], spec.path, features), REMOTE
        predictor = Predictor(read, fastest=True, gpu=self._gpu)
        return predictor, predictor.form

    def _surround(self, models: list[LoadedModel]) -> list[LoadedModel]:
        """Put the graph around the models; equal models stay one."""
        if not self._graph.members and not self._functions:
            return models
        wrapped: dict[int, GraphScorer] = {}
        for model in models:
            if id(model.scorer) not in wrapped:
                wrapped[id(model.scorer)] = _graph_scorer(self._functions, [(model.scorer, 1.0)])
        scorers = [wrapped[id(model.scorer)] for model in models]
        if self._graph.members:
            scorers[0] = _graph_scorer(self._functions, self._members(models))
        try:
            for scorer in {id(scorer): scorer for scorer in scorers}.values():
                _check_scores(scorer, self._numeric, self._categorical)
        except Exception as error:
            raise _graph_error(error) from error
        return [
            replace(model, scorer=scorer, baseline=self._baseline(model))
            for model, scorer in zip(models, scorers, strict=True)
        ]

    def _baseline(self, model: LoadedModel) -> dict[str, Value]:
        """Return a model's baseline over the endpoint's columns, which are what a graph reads."""
        missing = _missing_rows(self._numeric, self._categorical, 1)
        return {name: model.baseline.get(name, values[0]) for name, values in missing.items()}

    def _members(self, models: list[LoadedModel]) -> list[tuple[Scorer, float]]:
        answer, weights = models[0].spec.alias, self._graph.members
        served = {model.spec.alias: model.scorer for model in models}
        absent = sorted(set(weights) - set(served))
        if absent:
            raise ServingError(
                f"{', '.join(absent)} is a member of the graph, and not served",
                where="serving.graph.members",
                fix=f"deploy it with the others ({', '.join(served)}), or leave it out",
            )
        return [(served[alias], weight) for alias, weight in ({answer: 1.0} | weights).items()]


def _graph_scorer(functions: GraphFunctions, members: list[tuple[Scorer, float]]) -> GraphScorer:
    remote = any(isinstance(scorer, AsyncScorer) for scorer, _ in members)
    return (AsyncGraphScorer if remote else GraphScorer)(functions, members)


def _graph_error(error: Exception) -> ServingError:
    return ServingError(
        "the graph cannot score rows of missing values",
        where="serving.graph",
        why=str(error) or type(error).__name__,
        fix="let its functions take NaN in numeric columns, None and '' in the others, and give"
        " new arrays: those that they get are read-only",
    )


def _check_fit(encoder: EncoderSpec, numeric: frozenset[str], categorical: frozenset[str]) -> None:
    unknown = set(encoder.numeric) - numeric | set(encoder.categorical) - categorical
    if unknown:
        raise ValueError(f"it needs features that the endpoint has not: {sorted(unknown)}")


def _missing_rows(numeric: Iterable[str], categorical: Iterable[str], rows: int) -> Columns:
    numbers = {name: np.full(rows, np.nan) for name in numeric}
    texts = {name: np.array([""] * rows, dtype=object) for name in categorical}
    return {**numbers, **texts}


def _check_scores(scorer: Scorer, numeric: Iterable[str], categorical: Iterable[str]) -> None:
    # Shapes and gaps in memory that are wrong for several rows can look right for one.
    for rows in (1, 2):
        scores = scorer.predict(_missing_rows(numeric, categorical, rows))
        if scores.shape != (rows,) or not ((scores >= 0.0) & (scores <= 1.0)).all():
            text = f"it answers {rows} rows of missing values with {scores}, not with scores"
            raise ValueError(text)
