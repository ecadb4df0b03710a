from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.errors import TrainingError
from mlops_ray.metadata.package import EncoderSpec
from mlops_ray.training.encoder import Encoder

NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.just(math.nan))
WORDS = st.one_of(st.none(), st.text(max_size=3))
ROWS = st.integers(1, 30)


@st.composite
def frames(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    n = draw(ROWS)
    numeric = {
        name: np.array(draw(st.lists(NUMBERS, min_size=n, max_size=n))) for name in ("x", "y")
    }
    words = draw(st.lists(WORDS, min_size=n, max_size=n))
    return numeric, {"w": np.array(words, dtype=object)}


def naive(spec: EncoderSpec, row: dict[str, object]) -> tuple[list[float], list[int]]:
    numbers, missing = [], []
    for name, mean, std in zip(spec.numeric, spec.means, spec.stds, strict=True):
        value = float(row[name])  # type: ignore[arg-type]
        absent = math.isnan(value)
        scaled = 0.0 if absent else max(-spec.clip, min(spec.clip, (value - mean) / std))
        numbers.append(scaled)
        if name in spec.indicators:
            missing.append(float(absent))
    codes = [
        vocabulary.index(row[name]) + 1 if row[name] in vocabulary else 0
        for name, vocabulary in zip(spec.categorical, spec.vocabularies, strict=True)
    ]
    return numbers + missing, codes


@given(frames(), frames())
def test_encodes_each_row_as_the_definition_says(train, live):
    encoder = Encoder.fit(*train, clip=2.5)
    columns = live[0] | live[1]
    numeric, codes = encoder.encode(columns)
    for place in range(len(numeric)):
        expected = naive(encoder.spec, {name: c[place] for name, c in columns.items()})
        assert numeric[place].tolist() == np.array(expected[0], dtype=np.float32).tolist()
        assert codes[place].tolist() == expected[1]
    assert (numeric.dtype, codes.dtype) == (np.float32, np.int64)


@given(frames())
def test_moments_are_those_of_the_present_values(train):
    spec = Encoder.fit(*train).spec
    for name, mean, std in zip(spec.numeric, spec.means, spec.stds, strict=True):
        present = [v for v in train[0][name].tolist() if not math.isnan(v)]
        if present:
            centre = math.fsum(present) / len(present)
            spread = math.sqrt(math.fsum((v - centre) ** 2 for v in present) / len(present))
            assert mean == pytest.approx(centre, rel=1e-9, abs=1e-6)
            # In between, rounding decides whether the column counts as constant.
            if spread > 1e-6 or len(set(present)) == 1:
                assert std == pytest.approx(spread if spread > 1e-6 else 1.0, rel=1e-3)
        assert (name in spec.indicators) == bool(np.isnan(train[0][name]).any())


def test_many_rows_and_few_rows_take_the_same_codes():
    random = np.random.default_rng(0)
    kinds = ["a", "b", None, "new", b"a", 1, True, math.nan, "\ud800"]
    words = random.choice(np.array(kinds, dtype=object), 2000)
    encoder = Encoder.fit({}, {"w": np.array(["a", "b", None], dtype=object)})
    _, together = encoder.encode({"w": words})
    alone = [encoder.encode({"w": words[i : i + 1]})[1][0, 0] for i in range(len(words))]
    assert together[:, 0].tolist() == alone == [{"a": 1, "b": 2}.get(word, 0) for word in words]


def test_survives_json_exactly():
    random = np.random.default_rng(0)
    columns = {"x": random.standard_normal(50) * 1e-7, "y": random.standard_normal(50) * 1e7}
    spec = Encoder.fit(columns, {"w": np.array(["ü"] * 50, dtype=object)}).spec
    assert EncoderSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_missing_column_is_named():
    encoder = Encoder.fit({"x": np.ones(3), "y": np.ones(3)}, {})
    with pytest.raises(TrainingError, match="y"):
        encoder.encode({"x": np.ones(1)})
