from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import FeatureStoreError, SchemaError
from mlops_ray.features.columns import encode, key_columns
from mlops_ray.features.keys import encode_key, encode_keys

value = st.one_of(st.text(), st.integers(-(2**63), 2**63 - 1))
key = st.lists(value, min_size=1, max_size=3)


@settings(deadline=None)
@given(key, key)
def test_two_keys_have_equal_bytes_only_when_they_are_equal(first: list, second: list) -> None:
    same = [(type(v), v) for v in first] == [(type(v), v) for v in second]
    assert (encode_key(b"v", first) == encode_key(b"v", second)) == same


def test_the_traps() -> None:
    assert encode_key(b"v", ["1", "11"]) != encode_key(b"v", ["11", "1"])
    assert encode_key(b"v", ["as", "b"]) != encode_key(b"v", ["a", "sb"])
    assert encode_key(b"v", [1]) != encode_key(b"v", ["1"])
    assert encode_key(b"v", ["é"]) != encode_key(b"v", ["e\u0301"])
    assert encode_key(b"v", [""]) is not None


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_null_makes_no_key(missing: object) -> None:
    assert encode_key(b"v", ["a", missing]) is None


@pytest.mark.parametrize("wrong", [1.5, True, b"x"])
def test_other_types_are_refused(wrong: object) -> None:
    with pytest.raises(FeatureStoreError, match="string or a whole number"):
        encode_key(b"v", [wrong])


def test_long_keys_stay_within_the_store_s_limit_and_differ() -> None:
    first, second = encode_key(b"v", ["x" * 5000]), encode_key(b"v", ["x" * 5001])
    assert first is not None
    assert len(first) < 500
    assert first != second


def test_bytes_are_the_same_in_another_process() -> None:
    code = "from mlops_ray.features.keys import encode_key; print(encode_key(b'v', ['ü', 7]).hex())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = encode_key(b"v", ["ü", 7])
    assert expected is not None
    assert found.stdout.strip() == expected.hex()


def test_columns_of_either_numpy_kind_of_string_give_the_same_keys() -> None:
    texts = ["a", "bc"]
    assert list(encode_keys(b"v", [np.array(texts)])) == list(
        encode_keys(b"v", [np.array(texts, object)])
    )


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.text(max_size=2)), st.one_of(st.none(), st.integers(0, 3))
        )
    )
)
def test_codes_number_the_distinct_keys_by_appearance(rows: list) -> None:
    table = pa.table(
        {
            "a": pa.chunked_array([pa.array([r[0] for r in rows], pa.string())]),
            "b": pa.chunked_array([pa.array([r[1] for r in rows], pa.int64())]),
        }
    )
    codes, distinct = encode(key_columns(table, {"a": "string", "b": "int"}, "test"))
    order: dict[tuple, int] = {}
    expected = [-1 if None in row else order.setdefault(row, len(order)) for row in rows]
    assert codes.tolist() == expected
    assert list(zip(*(d.to_pylist() for d in distinct), strict=True)) == list(order)


def test_a_key_column_of_another_type_is_named() -> None:
    with pytest.raises(SchemaError, match="'a' has the wrong type: expected string, found int64"):
        key_columns(pa.table({"a": [1]}), {"a": "string"}, "views.v")
