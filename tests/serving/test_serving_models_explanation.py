from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import RequestError
from mlops_ray.metadata import package
from mlops_ray.serving.models.explanation import Explainer, baseline_of
from mlops_ray.training.inference import Predictor

Columns = dict[str, Any]
FIRST = list("abcdefghijklmnopqrst")


def sigmoid(logits: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)))


def logit(scores: Any) -> Any:
    return np.log(scores) - np.log1p(-np.asarray(scores))


class Crossed:
    """Features that act together, in pairs and threes; one category among them."""

    def __init__(self, names: list[str], seed: int = 3) -> None:
        random = np.random.default_rng(seed)
        self.names = names
        self.pairs = random.normal(0, 0.5, (len(names), len(names)))
        self.rows = 0

    def predict(self, columns: Columns) -> Any:
        x = np.stack([self.number(columns[name]) for name in self.names])
        self.rows += x.shape[1]
        logits = np.einsum("in,ij,jn->n", x, self.pairs, np.tanh(x)) + x[0] * x[-1] * x[1]
        return sigmoid(logits)

    @staticmethod
    def number(values: Any) -> Any:
        if values.dtype == object:
            return np.array([{"red": 1.0, "blue": -0.5}.get(v, 0.25) for v in values])
        return np.nan_to_num(values, nan=0.7)

    def one(self, row: dict[str, Any]) -> float:
        columns = {
            n: np.array([v], dtype=object if not isinstance(v, float) else np.float64)
            for n, v in row.items()
        }
        return float(logit(self.predict(columns))[0])


def crossed_rows(names: list[str], count: int, seed: int = 0) -> Columns:
    random = np.random.default_rng(seed)
    columns: Columns = {name: random.normal(size=count) for name in names}
    columns[names[0]][random.random(count) < 0.3] = np.nan
    columns[names[1]] = random.choice(np.array(["red", "blue", None], dtype=object), count)
    return columns


def crossed_baseline(names: list[str]) -> dict[str, Any]:
    return {name: 0.1 * place for place, name in enumerate(names)} | {names[1]: "blue"}


def by_definition(model: Crossed, row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """The mean over all orders of what a feature adds to those before it."""
    total = dict.fromkeys(row, 0.0)
    orders = list(itertools.permutations(row))
    for order in orders:
        present = dict(base)
        before = model.one(present)
        for name in order:
            present[name] = row[name]
            after = model.one(present)
            total[name] += after - before
            before = after
    return {name: value / len(orders) for name, value in total.items()}


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10_000))
def test_few_features_get_the_values_of_the_definition(count, seed):
    names = FIRST[:count]
    model, base = Crossed(names, seed), crossed_baseline(names)
    columns = crossed_rows(names, 3, seed)
    explained = Explainer(model.predict, base).explain(columns)
    for place in range(3):
        row = {name: _plain(columns[name][place]) for name in names}
        for name, value in by_definition(model, row, base).items():
            assert explained.contributions[name][place] == pytest.approx(value, abs=1e-9)


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, float) else value


def test_a_linear_model_has_its_closed_form_however_many_features():
    random = np.random.default_rng(1)
    slopes = dict(zip(FIRST, random.normal(size=20), strict=True))
    base = dict(zip(FIRST, random.normal(size=20).tolist(), strict=True))
    columns = {name: random.normal(size=7) for name in FIRST}

    def predict(given: Columns) -> Any:
        return sigmoid(0.3 + sum(slopes[name] * given[name] for name in FIRST))

    explained = Explainer(predict, base).explain(columns)
    assert explained.base == pytest.approx(0.3 + sum(slopes[n] * base[n] for n in FIRST), abs=1e-9)
    for name in FIRST:
        wanted = slopes[name] * (columns[name] - base[name])
        np.testing.assert_allclose(explained.contributions[name], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [1, 4, 10, 11, 20])
def test_contributions_add_up_to_the_logit_of_the_score(count):
    names = FIRST[:count]
    columns = crossed_rows(FIRST, 9)
    model = Crossed(FIRST)
    base = crossed_baseline(FIRST)

    def predict(given: Columns) -> Any:
        rows = len(given[names[0]])
        fixed = {n: np.full(rows, base[n]) for n in FIRST if n not in names and n != "b"}
        fixed["b"] = np.full(rows, "blue", dtype=object)
        return model.predict(fixed | {n: given[n] for n in names})

    explained = Explainer(predict, {n: base[n] for n in names}).explain(columns)
    np.testing.assert_array_equal(explained.scores, predict(columns))
    total = explained.base + sum(explained.contributions.values())
    np.testing.assert_allclose(total, logit(explained.scores), rtol=0, atol=1e-9)
    assert list(explained.contributions) == names


def test_more_orders_come_closer_to_the_exact_values():
    names = FIRST[:12]
    model, base = Crossed(names), crossed_baseline(names)
    columns = crossed_rows(names, 4)
    exact = exact_values(model, columns, base)
    errors = []
    for orders in (4, 64, 1024):
        found = Explainer(model.predict, base, orders=orders).explain(columns).contributions
        errors.append(max(float(np.abs(found[n] - exact[n]).max()) for n in names))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05 * max(float(np.abs(values).max()) for values in exact.values())


def exact_values(model: Crossed, columns: Columns, base: dict[str, Any]) -> dict[str, Any]:
    """The weighted sum over all subsets, which is independent of orders."""
    names = list(columns)
    rows = len(columns[names[0]])
    worth = {}
    for bits in range(1 << len(names)):
        given = {
            n: columns[n] if bits >> i & 1 else np.full(rows, base[n], dtype=columns[n].dtype)
            for i, n in enumerate(names)
        }
        worth[bits] = logit(model.predict(given))
    found = {}
    for i, name in enumerate(names):
        found[name] = np.zeros(rows)
        for bits in range(1 << len(names)):
            if not bits >> i & 1:
                size = bits.bit_count()
                weight = 1 / (len(names) * math.comb(len(names) - 1, size))
                found[name] += weight * (worth[bits | 1 << i] - worth[bits])
    return found


@pytest.mark.parametrize("count", [6, 14])
def test_what_a_row_is_told_does_not_depend_on_the_others_or_on_the_call(count):
    names = FIRST[:count]
    explainer = Explainer(Crossed(names).predict, crossed_baseline(names))
    columns = crossed_rows(names, 5)
    together = explainer.explain(columns)
    again = explainer.explain(columns)
    for place in range(5):
        alone = explainer.explain({n: v[place : place + 1] for n, v in columns.items()})
        for name in names:
            assert again.contributions[name][place] == together.contributions[name][place]
            assert alone.contributions[name][0] == pytest.approx(
                together.contributions[name][place], abs=1e-12
            )


def test_a_feature_that_the_model_ignores_or_that_is_as_in_the_baseline_adds_nothing():
    names = FIRST[:13]
    read = names[:12]
    model = Crossed(read)
    columns = crossed_rows(names, 3)
    columns["e"] = np.full(3, 0.4)
    explained = Explainer(model.predict, crossed_baseline(names)).explain(columns)
    assert explained.contributions["m"].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert explained.contributions["e"].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert np.abs(explained.contributions["a"]).min() > 1e-6


@pytest.mark.parametrize("count", [8, 16])
def test_the_work_is_bounded_and_too_many_rows_are_refused(count):
    names = FIRST[:count]
    model = Crossed(names)
    explainer = Explainer(model.predict, crossed_baseline(names), max_evaluations=5000)
    limit = explainer.max_rows
    explainer.explain(crossed_rows(names, limit))
    assert 2500 < model.rows <= 5000 + limit
    with pytest.raises(RequestError, match=f"send {limit}") as caught:
        explainer.explain(crossed_rows(names, limit + 1))
    assert caught.value.status == 413


def test_scores_of_nought_and_one_have_finite_contributions():
    explained = Explainer(
        lambda given: (given["x"] > 0).astype(np.float64), {"x": -1.0, "y": 0.0}
    ).explain({"x": np.array([1.0, -2.0]), "y": np.zeros(2)})
    assert explained.contributions["x"][0] == pytest.approx(2 * 52 * math.log(2))
    assert explained.contributions["x"][1] == 0


def test_a_packages_baseline_is_its_training_means_and_most_frequent_values(packages: list[Path]):
    read = package.read(packages[0])
    baseline = baseline_of(read.manifest.encoder, read.reference)
    assert list(baseline) == list(read.manifest.encoder.features)
    assert baseline["amount"] == read.manifest.encoder.means[-2]
    counts = read.reference.to_json()["categorical"]["coupon"]
    most = counts["values"][int(np.argmax(counts["counts"][:-1]))]
    assert baseline["coupon"] == most


def test_a_network_is_explained_with_its_own_scores(packages: list[Path]):
    read = package.read(packages[0])
    predictor = Predictor(read)
    baseline = baseline_of(read.manifest.encoder, read.reference)
    random = np.random.default_rng(0)
    columns: Columns = {n: random.normal(10, 5, 6) for n in read.manifest.encoder.numeric}
    columns["coupon"] = random.choice(np.array(["none", "spring", None], dtype=object), 6)
    columns["not_read"] = np.zeros(6)
    explained = Explainer(predictor.predict, baseline).explain(columns)
    np.testing.assert_array_equal(explained.scores, predictor.predict(columns))
    total = explained.base + sum(explained.contributions.values())
    np.testing.assert_allclose(total, logit(explained.scores), rtol=0, atol=1e-9)
    assert set(explained.contributions) == set(read.manifest.encoder.features)
