"""Entities keep their numbers, whether they come in bulk or a few at a time."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.features import entities
from mlops_ray.features.entities import Entities

FIELDS = pa.schema([("shop", pa.string()), ("shelf", pa.int64())])
keys = st.lists(
    st.tuples(st.sampled_from(["", "a", "ü", "1", "11"]), st.integers(-2, 12)), max_size=20
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(keys, st.booleans()), max_size=6))
def test_a_key_has_one_number_for_good(story: list) -> None:
    known = Entities(FIELDS)
    numbers: dict[tuple[str, int], int] = {}
    for rows, bulk in story:
        table = pa.table(
            {"shop": [shop for shop, _ in rows], "shelf": [shelf for _, shelf in rows]},
            schema=FIELDS,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(entities, "_FEW_ROWS", 0 if bulk else 256)
            patch.setattr(entities, "_MOST_CHUNKS", 2)
            found = known.numbers(table).tolist()
        for row, number in zip(rows, found, strict=True):
            assert numbers.setdefault(row, number) == number
        assert len(set(numbers.values())) == len(numbers) == len(known)
        shops, shelves = (
            column.to_pylist() for column in known.keys(pa.array(found, pa.int64()).to_numpy())
        )
        assert list(zip(shops, shelves, strict=True)) == rows


def test_the_first_ones_are_sorted() -> None:
    known = Entities(FIELDS)
    table = pa.table({"shop": ["b", "a", "b", "a"], "shelf": [1, 9, 0, 2]}, schema=FIELDS)
    assert known.numbers(table).tolist() == [3, 1, 2, 0]
