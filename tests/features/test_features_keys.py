"""The hash of entity keys: typed, stable, spread evenly."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.keys import key_hash

texts = st.one_of(st.none(), st.text(max_size=20))
numbers = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))


def one(*values: int | str | None) -> int:
    columns = [pa.array([v], pa.string() if not isinstance(v, int) else pa.int64()) for v in values]
    return int(key_hash(columns)[0])


def test_it_is_the_same_in_every_process_and_version() -> None:
    """Stored tables are cut by it: it may never change."""
    known = {("",): 17696951074988357315, ("1",): 3515587182635193913, (1,): 0}
    known[(1,)] = 10127858673864917041
    assert {key: one(*key) for key in known} == known
    program = (
        "import pyarrow as pa; from mlops_ray.features.keys import key_hash;"
        "print(key_hash([pa.array(['ü', 'x' * 100, None]), pa.array([1, 2, 3])]).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    columns = [pa.array(["ü", "x" * 100, None]), pa.array([1, 2, 3])]
    assert done.stdout.strip() == str(key_hash(columns).tolist())


def test_types_and_places_count() -> None:
    keys = [("1", "11"), ("11", "1"), ("1", "1"), ("111", ""), ("", "111"), (1, "1"), ("1", 1)]
    keys += [("1",), (1,), ("11",), (11,), ("",), (0,), (None,), (None, "1"), ("1", None)]
    assert len({one(*key) for key in keys}) == len(keys)


@given(st.lists(st.tuples(texts, numbers), min_size=1, max_size=30), st.integers(0, 29))
def test_it_is_the_hash_of_the_values_alone(
    rows: list[tuple[str | None, int | None]], cut: int
) -> None:
    names = pa.array([name for name, _ in rows], pa.string())
    whole = pa.array([number for _, number in rows], pa.int64())
    hashes = key_hash([names, whole])
    assert hashes.dtype == np.uint64
    chunked = [pa.chunked_array([column[:cut], column[cut:]]) for column in (names, whole)]
    sliced = [column[cut:] for column in (names.cast(pa.large_string()), whole)]
    encoded = [names.dictionary_encode(), whole]
    assert key_hash(chunked).tolist() == hashes.tolist() == key_hash(encoded).tolist()
    assert key_hash(sliced).tolist() == hashes[cut:].tolist()
    keys = {row: int(found) for row, found in zip(rows, hashes, strict=True)}
    assert len(set(keys.values())) == len(keys)


def test_buckets_are_even_even_for_neighbouring_keys() -> None:
    for column in (pa.array(range(160_000)), pa.array([f"shop-{n}" for n in range(160_000)])):
        counts = np.bincount((key_hash([column]) % np.uint64(16)).astype(int), minlength=16)
        assert counts.min() > 9_500
        assert counts.max() < 10_500


def test_other_types_are_refused() -> None:
    with pytest.raises(FeatureStoreError, match="not double"):
        key_hash([pa.array([1.5])])
