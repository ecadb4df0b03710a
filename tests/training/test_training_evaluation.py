from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from mlops_ray.config.training import Evaluation
from mlops_ray.errors import TrainingError
from mlops_ray.training import evaluation as ev

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), min_size=2, max_size=80)


def sample(count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    scores = random.random(count).round(2)
    return (random.random(count) < scores**2).astype(np.int8), scores


@given(PAIRS)
def test_auc_with_ties_is_the_share_of_ordered_pairs(pairs):
    labels = np.array([label for label, _ in pairs])
    scores = np.array([score / 20 for _, score in pairs])
    positive, negative = scores[labels == 1], scores[labels == 0]
    found = ev.auc(labels, scores)
    if len(positive) == 0 or len(negative) == 0:
        assert math.isnan(found)
    else:
        wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
        assert found == pytest.approx(wins / (len(positive) * len(negative)), abs=1e-12)
        assert found == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)


def test_log_loss_agrees_with_sklearn():
    labels, scores = sample()
    inside = scores.clip(0.001, 0.999)
    assert ev.log_loss(labels, inside) == pytest.approx(sk.log_loss(labels, inside), abs=1e-12)
    assert math.isfinite(ev.log_loss(np.array([1, 0]), np.array([0.0, 1.0])))


def test_calibration_bins_agree_with_a_group_by():
    labels, scores = sample()
    frame = pl.DataFrame({"y": labels, "s": scores}).with_columns(
        bin=(pl.col("s") * 7).floor().clip(0, 6)
    )
    grouped = frame.group_by("bin").agg(pl.mean("s"), pl.mean("y"), pl.len()).sort("bin")
    found = ev.calibration(labels, scores, 7)
    np.testing.assert_allclose(found, grouped.select("s", "y", "len").to_numpy(), atol=1e-12)
    gaps = grouped.select(((pl.col("s") - pl.col("y")).abs() * pl.col("len")).sum()).item()
    assert ev.calibration_error(found) == pytest.approx(gaps / len(labels), abs=1e-12)


def test_a_perfectly_calibrated_model_has_no_error_and_a_shifted_one_has_the_shift():
    labels = np.tile([0, 1], 500)
    assert ev.calibration_error(ev.calibration(labels, np.full(1000, 0.5), 10)) == 0
    shifted = ev.calibration_error(ev.calibration(labels, np.full(1000, 0.8), 10))
    assert shifted == pytest.approx(0.3)


def test_slices_agree_with_filters_and_small_ones_are_left_out():
    labels, scores = sample()
    groups = np.random.default_rng(1).choice(np.array(["x", "y", "rare"], dtype=object), 4000)
    groups[2000:] = np.where(groups[2000:] == "rare", "x", groups[2000:])
    limit = int((groups == "rare").sum()) + 1
    report = ev.evaluate(
        labels, scores, Evaluation(slices=("g",), min_slice_rows=limit), {"g": groups}
    )
    assert [item.value for item in report.slices] == ["x", "y"]
    for item in report.slices:
        chosen = groups == item.value
        assert item.rows == chosen.sum()
        assert item.auc == pytest.approx(sk.roc_auc_score(labels[chosen], scores[chosen]))
        assert item.log_loss == pytest.approx(ev.log_loss(labels[chosen], scores[chosen]))


def test_a_slice_of_one_class_has_no_auc():
    labels, scores = np.array([0, 1, 1, 1]), np.array([0.1, 0.5, 0.6, 0.7])
    groups = np.array(["a", "a", "b", "b"], dtype=object)
    report = ev.evaluate(labels, scores, Evaluation(min_slice_rows=1), {"g": groups})
    assert [item.auc for item in report.slices] == [1.0, None]


@pytest.mark.parametrize(
    ("labels", "scores"), [([1, 1], [0.5, 0.5]), ([0, 1], [0.5, math.nan]), ([0, 1], [0.5, 1.5])]
)
def test_what_cannot_be_judged_is_refused(labels, scores):
    with pytest.raises(TrainingError):
        ev.evaluate(np.array(labels), np.array(scores), Evaluation())
