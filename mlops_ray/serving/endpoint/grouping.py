"""Requests side by side: one set of columns for all of them, and which rows are whose."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mlops_ray.errors import ServingError
from mlops_ray.features.matrix import join, take
from mlops_ray.serving.endpoint.routing import Router
from mlops_ray.serving.formats.request import PredictRequest
from mlops_ray.serving.log.encoding import Answered, Part
from mlops_ray.serving.log.prediction_log import Added
from mlops_ray.serving.models.loading import Columns, LoadedModel, ModelSet

Rows = NDArray[np.int64]
Scores = NDArray[np.float64]

_NOTHING: Scores = np.empty(0)


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way. Without ``wanted``, the keys of its rows say who answers them.

    ``model`` is who answered; ``by_row`` who answered each row, where not all are one model's;
    ``added`` what the log was given, with the rows of others of the same batch. ``columns`` are the
    features where a model in another process has yet to score rows.
    """

    request: PredictRequest
    ids: list[str]
    models: ModelSet
    wanted: LoadedModel | None
    began_s: float
    log: bool
    scores: Scores = field(default_factory=lambda: _NOTHING)
    model: LoadedModel | None = None
    by_row: list[LoadedModel] | None = None
    degraded: str = ""
    added: Sequence[Added] = ()
    columns: Columns | None = None


@dataclass(slots=True, eq=False)
class Group:
    """Rows of a batch that one model answers, None for all of them."""

    models: ModelSet
    model: LoadedModel
    rows: Rows | None
    seconds: float = 0.0


def merged(jobs: Sequence[Job]) -> Columns:
    """Return the inputs of all jobs, one after the other."""
    if len(jobs) == 1:
        return jobs[0].request.columns
    return join([job.request.columns for job in jobs])


def predict(groups: Sequence[Group], columns: Columns, rows: int) -> Scores:
    """Return the scores of all groups by row, and note how long each took.

    Rows of models in other processes get 0: they are for who can wait.

    Raises:
        ServingError: A score is no number.
    """
    scores = np.zeros(rows) if len(groups) > 1 or groups[0].model.remote else _NOTHING
    for group in groups:
        if group.model.remote:
            continue
        began_s = time.perf_counter()
        found = group.model.scorer.predict(taken(columns, group.rows))
        if group.rows is None:
            scores = found
        else:
            scores[group.rows] = found
        group.seconds = time.perf_counter() - began_s
    check_scores(groups, scores)
    return scores


def check_scores(groups: Sequence[Group], scores: Scores) -> None:
    """Raise ServingError where a score is no number."""
    # A sum is no number where one of its terms is none, and quicker than asking each.
    if not math.isfinite(scores.sum()):
        versions = ", ".join(str(group.model.spec.version) for group in groups)
        raise ServingError(f"version {versions} gave a score that is no number")


def share_out(jobs: Sequence[Job], scores: Scores, degraded: str) -> None:
    """Give each job its scores, and say what its features were made without."""
    start = 0
    for job in jobs:
        stop = start + job.request.rows
        job.scores = scores[start:stop]
        job.degraded = degraded
        start = stop


def hand_out(jobs: Sequence[Job], columns: Columns) -> None:
    """Give the jobs their columns that models in other processes answer, if only in part."""
    start = 0
    for job in jobs:
        stop = start + job.request.rows
        owners: Sequence[LoadedModel | None] = job.by_row or [job.model]
        if any(model is not None and model.remote for model in owners):
            job.columns = take(columns, slice(start, stop))
        start = stop


def narrowed(groups: Sequence[Group], wanted: NDArray[np.bool_]) -> list[Group]:
    """Return groups of the wanted rows of a batch only."""
    found = []
    for group in groups:
        inside = wanted if group.rows is None else wanted[group.rows]
        if inside.any():
            places = np.flatnonzero(inside)
            rows = places if group.rows is None else group.rows[places]
            found.append(Group(group.models, group.model, rows))
    return found


def taken(columns: Columns, rows: Rows | None) -> Columns:
    """Return some rows of columns, with None all of them."""
    return columns if rows is None else take(columns, rows)


def places(rows: Rows | None) -> slice | Rows:
    """Return what indexes these rows of an array."""
    return slice(None) if rows is None else rows


def groups_of(router: Router, jobs: Sequence[Job], inputs: Columns) -> list[Group]:
    """Return who answers which rows of the jobs, one after the other; note it in the jobs."""
    first = jobs[0]
    models, model = first.models, first.wanted
    if all(job.wanted is model and job.models is models for job in jobs):
        if model is not None:
            for job in jobs:
                job.model = model
            return [Group(models, model, None)]
        candidates, owners = router.owners(models, inputs)
        _note(jobs, candidates, owners)
        if owners.count(owners[0]) == len(owners):
            return [Group(models, candidates[owners[0]], None)]
        by_row = np.array(owners)
        return [
            Group(models, candidates[place], np.flatnonzero(by_row == place))
            for place in sorted(set(owners))
        ]
    groups = _mixed_groups(router, jobs)
    if len(groups) == 1:
        groups[0].rows = None
    return groups


def _mixed_groups(router: Router, jobs: Sequence[Job]) -> list[Group]:
    """Do the same for jobs that differ in their models."""
    found: dict[tuple[int, int], tuple[ModelSet, LoadedModel, list[Rows]]] = {}
    start = 0
    for job in jobs:
        for group in groups_of(router, [job], job.request.columns):
            key = (id(group.models), id(group.model))
            rows = np.arange(job.request.rows) if group.rows is None else group.rows
            found.setdefault(key, (group.models, group.model, []))[2].append(rows + start)
        start += job.request.rows
    return [Group(m, model, np.concatenate(rows)) for m, model, rows in found.values()]


def _note(jobs: Sequence[Job], candidates: list[LoadedModel], owners: list[int]) -> None:
    start = 0
    for job in jobs:
        stop = start + job.request.rows
        owned = owners[start:stop]
        job.model = candidates[owned[0]]
        if owned.count(owned[0]) < len(owned):
            job.by_row = [candidates[place] for place in owned]
        start = stop


def answered_by(batch: Answered, groups: Sequence[Group]) -> Answered:
    """Return what is kept of a batch: the rows of groups that have the same models."""
    models = groups[0].models
    places = [group.rows for group in groups if group.rows is not None]
    if not places or sum(map(len, places)) == len(batch.ids):
        parts = [Part(g.model, g.rows, g.model.spec.alias) for g in groups]
        return replace(batch, models=models, parts=parts)
    # The log holds on to what it is given.
    kept = np.concatenate(places)
    ends = np.cumsum([len(rows) for rows in places]).tolist()
    return Answered(
        models,
        [
            Part(group.model, np.arange(end - len(rows), end), group.model.spec.alias)
            for group, rows, end in zip(groups, places, ends, strict=True)
        ],
        [batch.ids[row] for row in kept.tolist()],
        batch.times[kept],
        batch.scores[kept],
        take(batch.inputs, kept),
        take(batch.columns, kept),
        batch.latency_us[kept],
    )
