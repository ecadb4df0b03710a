from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlops_ray.metadata.stability import psi, psi_by_feature, psi_noise

counts = st.lists(st.integers(0, 10_000), min_size=1, max_size=40)


@given(st.data(), counts)
def test_psi_is_the_sum_of_both_divergences(data: st.DataObject, reference: list[int]) -> None:
    size = len(reference)
    live = data.draw(st.lists(st.integers(0, 10_000), min_size=size, max_size=size))
    pairs = [(n, m) for n, m in zip(reference, live, strict=True) if n or m]
    if not sum(reference) or not sum(live):
        assert psi(reference, live) == 0
        return
    p = np.array([n + 0.5 for n, _ in pairs])
    q = np.array([m + 0.5 for _, m in pairs])
    expected = stats.entropy(p, q) + stats.entropy(q, p)  # scipy normalises
    assert psi(reference, live) == pytest.approx(expected, abs=1e-12)


@given(counts, st.integers(1, 50))
def test_psi_is_symmetric_and_never_negative(reference: list[int], seed: int) -> None:
    live = np.random.default_rng(seed).integers(0, 100, len(reference))
    assert psi(reference, live) >= 0
    assert psi(reference, live) == pytest.approx(psi(live, reference))
    assert psi(reference, reference) == 0


def test_psi_by_hand() -> None:
    p, q = (80.5 / 101, 20.5 / 101), (50.5 / 101, 50.5 / 101)
    by_hand = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert psi([80, 20], [50, 50]) == pytest.approx(by_hand)
    assert by_hand > 0.2


def test_cells_empty_on_both_sides_change_nothing() -> None:
    assert psi([80, 20], [500, 50]) == psi([80, 0, 20], [500, 0, 50])


def test_psi_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="2 cells, live has 3"):
        psi([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="negative"):
        psi([1, -2], [1, 2])


def test_noise_agrees_with_simulation() -> None:
    random = np.random.default_rng(7)
    share = np.full(10, 0.1)
    drawn = [
        psi(random.multinomial(20_000, share), random.multinomial(1_000, share)) for _ in range(400)
    ]
    assert np.mean(drawn) == pytest.approx(psi_noise(10, 20_000, 1_000), rel=0.1)
    assert psi_noise(10, 100, 0) == math.inf


def test_psi_by_feature_takes_what_both_have() -> None:
    found = psi_by_feature({"a": [5, 5], "b": [9, 1], "gone": [1]}, {"b": [1, 9], "a": [5, 5]})
    assert list(found) == ["a", "b"]
    assert found["a"] == 0
    assert found["b"] > 1
