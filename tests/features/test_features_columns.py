from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import SchemaError
from mlops_ray.features.columns import encode, key_columns


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
