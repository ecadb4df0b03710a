from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.online.encoding import encode_columns, encode_keys

_texts = st.text(max_size=8) | st.text(min_size=120, max_size=300)
_wholes = st.integers(-(2**63), 2**63 - 1)


def objects(values: list) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_the_bytes_are_those_of_other_processes_and_releases() -> None:
    (key,) = encode_keys(b"p", [objects(["süd"]), np.array([-1])])
    assert key == b"ps\x00\x00\x00\x04s\xc3\xbcdi" + b"\xff" * 8
    code = (
        "import numpy as np; from mlops_ray.features.online.encoding import encode_keys;"
        "print(encode_keys(b'p', [np.array(['süd' * 200], object)])[0].hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (long,) = encode_keys(b"p", [objects(["süd" * 200])])
    assert done.stdout.strip() == long.hex()
    assert len(long) == 34


def test_keys_are_typed_and_unambiguous() -> None:
    pairs = [("1", "11"), ("11", "1"), ("", "111"), ("1s", "1")]
    columns = [objects([pair[at] for pair in pairs]) for at in range(2)]
    assert len(set(encode_keys(b"", columns))) == len(pairs)
    assert encode_keys(b"", [objects(["1"])]) != encode_keys(b"", [np.array([1])])
    assert encode_keys(b"", [objects([1])]) == encode_keys(b"", [np.array([1])])
    whole = encode_keys(b"p", [objects(["a", None, "b"]), objects([1, 2, None])])
    assert whole == [encode_keys(b"p", [objects(["a"]), np.array([1])])[0], None, None]
    assert encode_keys(b"p", [np.array([np.nan])]) == [None]
    assert encode_keys(b"p", [objects(["\ud800", np.str_("a")])]) == [
        None, *encode_keys(b"p", [objects(["a"])]),
    ]  # fmt: skip
    for whole in (np.int64(7), np.int8(7), np.uint64(7)):
        assert encode_keys(b"p", [objects([whole])]) == encode_keys(b"p", [np.array([7])])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_texts, _wholes, _texts), min_size=1, max_size=12), st.booleans())
def test_arrow_columns_give_the_same_bytes_and_no_two_keys_are_equal(
    rows: list, sliced: bool
) -> None:
    repeated = rows * (200 // len(rows))
    texts, wholes, more = ([row[at] for row in repeated] for at in range(3))
    arrays = [pa.array(texts, pa.string()), pa.array(wholes, pa.int64()), pa.array(more)]
    columns = [objects(texts), np.array(wholes, np.int64), objects(more)]
    if sliced:
        arrays, columns = [a.slice(3, 150) for a in arrays], [c[3:153] for c in columns]
    keys = encode_keys(b"prefix", columns)
    assert encode_columns(b"prefix", arrays) == keys
    assert encode_columns(b"prefix", [a.slice(0, 5) for a in arrays]) == keys[:5]
    shown = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(set(keys)) == len(set(shown))


def test_other_types_are_refused() -> None:
    for column in (
        np.array([1.5]),
        np.array([True]),
        objects([2**63]),
        objects([np.bool_(1)]),
        objects([b"x"]),
    ):
        with pytest.raises(FeatureStoreError, match="a string or a whole number of 64 bits"):
            encode_keys(b"", [column])
