"""HyperLogLog: right within its error, the same in any order, batch and process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import SchemaError
from mlops_ray.features.hyperloglog import codes_of, estimate, reduce_codes


def distinct(values: pa.Array) -> int:
    codes = codes_of(values)
    return int(estimate(codes, np.zeros(len(codes), np.int64), 1)[0])


@pytest.mark.parametrize("count", [0, 1, 7, 30, 300, 3_000, 30_000, 300_000])
def test_error_is_what_the_theory_says(count: int) -> None:
    errors = []
    for seed in range(12):
        first = seed * 10_000_000
        found = distinct(pa.array(range(first, first + count), pa.int64()))
        errors.append(found / count - 1 if count else found)
    # Its standard error is 3.25 %; so the mean of squares of 12 stays within twice that.
    assert np.sqrt(np.mean(np.square(errors))) < 0.065
    if count <= 7:
        assert not any(errors)


def test_values_of_any_type() -> None:
    moments = pa.array([0, 0, 1, 2], pa.timestamp("us", "UTC"))
    assert distinct(pa.array(["a", "a", "b", "ü"])) == 3
    assert distinct(pa.array(["a", "a", "b", "ü"]).dictionary_encode()) == 3
    assert distinct(pa.array([0.0, -0.0, float("nan"), -float("nan"), 0.5])) == 3
    assert distinct(pa.array([True, False, True])) == 2
    assert distinct(moments) == 3
    assert distinct(pa.array([1, 2, 2], pa.int8())) == 2


def test_whole_numbers_of_64_bits_and_bytes_are_counted_too() -> None:
    assert distinct(pa.array([2**63 + 1, 2**63 + 1, 2**64 - 1, 1], pa.uint64())) == 3
    assert distinct(pa.array([b"\xff", b"\xff", b"\xfe", b"a"])) == 3


@pytest.mark.parametrize("values", [[[1], [2]], [{"a": 1}]])
def test_nested_values_are_refused_by_name(values: list) -> None:
    with pytest.raises(SchemaError, match=r"views\.v\.items: distinct values of type"):
        codes_of(pa.array(values), "views.v.items")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), max_size=300), st.randoms())
def test_merging_in_any_order_changes_nothing(rows: list, random) -> None:
    owner = np.array([row[0] for row in rows], np.int64)
    codes = codes_of(pa.array([row[1] for row in rows], pa.int64()))
    whole = estimate(codes, owner, 4)
    order = np.array(random.sample(range(len(rows)), len(rows)), np.int64)
    half = len(rows) // 2
    parts = [reduce_codes(codes[some], owner[some]) for some in (order[:half], order[half:])]
    merged = estimate(*(np.concatenate(column) for column in zip(*parts, strict=True)), 4)
    assert merged.tolist() == whole.tolist()


def test_codes_are_the_same_in_every_process() -> None:
    code = (
        "import pyarrow as pa; from mlops_ray.features.hyperloglog import codes_of;"
        "print(codes_of(pa.array(['a', 'ü', 'longer than eight'])).tolist())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = codes_of(pa.array(["a", "ü", "longer than eight"])).tolist()
    assert told.stdout.strip() == str(ours)
