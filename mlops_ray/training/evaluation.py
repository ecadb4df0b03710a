"""How good scores are: ranking, probability, calibration; overall and by slice."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from mlops_ray.config.training import Evaluation
from mlops_ray.errors import TrainingError
from mlops_ray.metadata.types import Report, SliceMetrics

Scores = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[Any]
Calibration = tuple[tuple[float, float, int], ...]

_SMALLEST = 1e-15


def auc(labels: Labels, scores: Scores) -> float:
    """Return the chance that a positive row scores above a negative one, ties counting half.

    It is the Mann-Whitney U statistic over the number of pairs (Hanley and McNeil 1982). NaN where
    one class is absent. ``labels`` are 0 or 1, [n]; ``scores`` [n].
    """
    positive = np.asarray(labels) > 0.5
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2.0
    rank_sum = float(mean_ranks[places][positive].sum())
    return (rank_sum - positives * (positives + 1) / 2.0) / (positives * negatives)


def log_loss(labels: Labels, scores: Scores) -> float:
    """Return the mean negative log likelihood in nats; scores are kept 1e-15 away from 0 and 1."""
    likely = np.clip(np.asarray(scores, dtype=np.float64), _SMALLEST, 1 - _SMALLEST)
    positive = np.asarray(labels) > 0.5
    return float(-np.mean(np.where(positive, np.log(likely), np.log1p(-likely))))


def calibration(labels: Labels, scores: Scores, bins: int) -> Calibration:
    """Return (mean score, share of positives, rows) of each non-empty of ``bins`` equal widths."""
    scores = np.asarray(scores, dtype=np.float64)
    places = np.minimum((scores * bins).astype(np.int64), bins - 1)
    rows = np.bincount(places, minlength=bins)
    sums = np.bincount(places, weights=scores, minlength=bins)
    positives = np.bincount(places, weights=np.asarray(labels, dtype=np.float64), minlength=bins)
    return tuple(
        (float(sums[b] / rows[b]), float(positives[b] / rows[b]), int(rows[b]))
        for b in range(bins)
        if rows[b]
    )


def calibration_error(bins: Calibration) -> float:
    """Return the expected calibration error: Σ rows/n · |share of positives − mean score|
    (Naeini et al. 2015, equation 3)."""
    total = sum(rows for _, _, rows in bins)
    return sum(rows * abs(share - score) for score, share, rows in bins) / max(total, 1)


def evaluate(
    labels: Labels,
    scores: Scores,
    evaluation: Evaluation,
    slices: Mapping[str, Labels] | None = None,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Report:
    """Measure ``scores`` [n] against ``labels`` [n]; ``slices`` are columns [n] to group by.

    Raises:
        TrainingError: the rows are not of both classes, or a score is not a probability.
    """
    positives = int((np.asarray(labels) > 0.5).sum())
    if positives in (0, len(labels)):
        raise TrainingError(
            f"{len(labels)} held-out rows with {positives} positives cannot judge a model",
            why="the metrics need rows of both classes",
            fix="widen training.split.test",
        )
    if not np.all((np.asarray(scores) >= 0) & (np.asarray(scores) <= 1)):
        raise TrainingError(
            "the model's scores are not all between 0 and 1",
            why="the training diverged, or a feature is infinite",
            fix="lower training.learning_rate, or look at the features' expectations",
        )
    bins = calibration(labels, scores, evaluation.calibration_bins)
    return Report(
        rows=len(labels),
        positives=positives,
        auc=auc(labels, scores),
        log_loss=log_loss(labels, scores),
        calibration_error=calibration_error(bins),
        calibration=bins,
        slices=tuple(
            metrics
            for column, values in (slices or {}).items()
            for metrics in _slices(column, values, labels, scores, evaluation.min_slice_rows)
        ),
        since=since,
        until=until,
    )


def _slices(
    column: str, values: Labels, labels: Labels, scores: Scores, min_rows: int
) -> list[SliceMetrics]:
    found, places = np.unique(values.astype(str), return_inverse=True)
    order = np.argsort(places, kind="stable")
    ends = np.cumsum(np.bincount(places, minlength=len(found)))
    metrics = []
    for value, rows in zip(found, np.split(order, ends[:-1]), strict=True):
        if len(rows) >= min_rows:
            ranking = auc(labels[rows], scores[rows])
            metrics.append(
                SliceMetrics(
                    column=column,
                    value=str(value),
                    rows=len(rows),
                    auc=None if np.isnan(ranking) else ranking,
                    log_loss=log_loss(labels[rows], scores[rows]),
                )
            )
    return metrics
