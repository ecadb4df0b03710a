from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import SchemaError
from mlops_ray.features.columns import (
    INSTANT,
    encode,
    key_columns,
    normalise_instants,
    numbers,
    to_instants,
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


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_instants_of_the_hour_that_a_zone_has_twice(unit: str) -> None:
    moments = [datetime(2023, 10, 29, 0, 30, tzinfo=UTC), datetime(2023, 10, 29, 1, 30, tzinfo=UTC)]
    local = pa.chunked_array([pa.array(moments, pa.timestamp(unit, "Europe/Berlin"))])
    assert to_instants(local, "at").to_pylist() == moments
    normal = normalise_instants(pa.table({"at": local}))
    assert normal.schema.field("at").type == INSTANT
    assert normal["at"].to_pylist() == moments


def test_what_is_finer_than_a_microsecond_is_cut_off_towards_the_past() -> None:
    for zone in (None, "UTC", "Europe/Berlin"):
        values = pa.array([1999, -1], pa.int64()).cast(pa.timestamp("ns", zone))
        cut = to_instants(pa.chunked_array([values]), "at").cast(pa.int64())
        assert cut.to_pylist() == [1, -1]


def test_a_column_of_nulls_alone_fits_every_type() -> None:
    table = pa.table({"a": pa.nulls(2)})
    values, valid = numbers(table, "a", "test")
    assert (values.tolist(), valid.tolist()) == ([0.0, 0.0], [False, False])
    (keys,) = key_columns(table, {"a": "string"}, "test")
    assert (keys.type, keys.null_count) == (pa.string(), 2)
