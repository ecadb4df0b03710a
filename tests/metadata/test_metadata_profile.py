from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.errors import DataError
from mlops_ray.metadata.profile import CategoricalBins, NumericBins, Profile, Reference, merge

NUMBERS = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1e9, 1e9), st.just(math.nan)), max_size=60
).map(np.array)
WORDS = st.lists(st.one_of(st.none(), st.sampled_from("abcdef")), max_size=60)


def training() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.standard_normal(1000)
    x[::7] = np.nan
    return {"x": x, "w": random.choice(np.array(["a", "b", "c"], dtype=object), 1000)}


REFERENCE = Reference.fit(training(), 10)


@given(NUMBERS, NUMBERS, st.integers(2, 12))
def test_each_number_is_counted_in_the_bin_whose_bounds_hold_it(train, live, bins):
    fitted = NumericBins.fit(train, bins)
    bounds = [-math.inf, *fitted.edges.tolist(), math.inf]
    expected = [0] * fitted.size
    for value in live.tolist():
        if math.isnan(value):
            expected[-1] += 1
        else:
            place = next(i for i in range(len(bounds) - 1) if bounds[i] <= value < bounds[i + 1])
            expected[place] += 1
    assert fitted.count(live).tolist() == expected
    assert len(fitted.labels) == fitted.size
    assert len(fitted.edges) == len(set(fitted.edges.tolist()))


def test_bins_of_continuous_values_are_equally_full():
    counts = NumericBins.fit(np.random.default_rng(1).standard_normal(10_000), 10).count
    train = counts(np.random.default_rng(1).standard_normal(10_000))
    assert len(train) == 11
    assert np.abs(train[:-1] - 1000).max() <= 1
    assert train[-1] == 0


def test_edges_are_quantiles_by_their_definition():
    values = np.random.default_rng(2).standard_normal(999)
    ordered = sorted(values.tolist())
    expected = [ordered[math.ceil(q * 999) - 1] for q in (0.25, 0.5, 0.75)]
    assert NumericBins.fit(values, 4).edges.tolist() == expected


def test_a_constant_column_shows_any_change():
    fitted = NumericBins.fit(np.full(100, 7.0), 10)
    assert fitted.count(np.array([6.9, 7.0, 7.0, 7.1])).tolist() == [1, 2, 1, 0]


def test_a_frequent_value_has_a_bin_of_its_own():
    values = np.concatenate([np.zeros(800), np.random.default_rng(0).random(200) + 0.1])
    fitted = NumericBins.fit(values, 10)
    assert 800 in fitted.count(values).tolist()


def test_a_column_without_values_counts_all_as_missing():
    fitted = NumericBins.fit(np.full(5, np.nan), 10)
    assert fitted.count(np.array([np.nan, 1.0])).tolist() == [1, 1]


@given(WORDS, WORDS)
def test_categories_are_counted_and_the_rest_is_other(train, live):
    fitted = CategoricalBins.fit(np.array(train, dtype=object), limit=3)
    tally = Counter(word for word in train if word is not None)
    assert all(tally[a] >= tally[b] for a in fitted.values for b in tally if b not in fitted.values)
    counts = fitted.count(np.array(live, dtype=object)).tolist()
    assert counts[:-1] == [live.count(value) for value in fitted.values]
    assert sum(counts) == len(live)


@given(st.lists(st.lists(st.floats(-3, 3), max_size=20), min_size=3, max_size=3))
def test_profiles_are_a_commutative_monoid_and_sum_like_the_rows(parts):
    a, b, c = (REFERENCE.bin({"x": np.array(part)}) for part in parts)
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c)) == merge([a, b, c])
    assert a.merge(Profile()) == a == Profile().merge(a)
    assert merge([a, b, c]) == REFERENCE.bin({"x": np.array([x for part in parts for x in part])})


def test_merging_leaves_its_arguments_alone():
    a = REFERENCE.bin({"x": np.array([0.0])})
    before = a.counts["x"].copy()
    a.merge(a, a)
    assert a.counts["x"].tolist() == before.tolist()


def test_profiles_of_different_references_do_not_merge():
    other = Reference.fit({"x": np.arange(3.0)}, 3)
    with pytest.raises(DataError, match="bins"):
        REFERENCE.profile.merge(other.profile)


def test_json_gives_the_same_reference_back():
    text = json.dumps(REFERENCE.to_json())
    again = Reference.from_json(json.loads(text))
    assert again.digest == REFERENCE.digest
    assert again.profile == REFERENCE.profile
    live = {"x": np.linspace(-4, 4, 333), "w": np.array(["a", "z", None] * 111, dtype=object)}
    assert again.bin(live) == REFERENCE.bin(live)
    assert Profile.from_json(json.loads(json.dumps(again.bin(live).to_json()))) == again.bin(live)


def test_the_reference_holds_the_counts_of_its_training_rows():
    assert REFERENCE.bin(training()) == REFERENCE.profile
    assert REFERENCE.profile.counts["x"][-1] == np.isnan(training()["x"]).sum()


def test_features_that_are_not_given_are_left_out_and_others_ignored():
    counted = REFERENCE.bin({"w": np.array(["a"], dtype=object), "id": np.array(["1"])})
    assert set(counted.counts) == {"w"}
    assert counted.rows == 1
