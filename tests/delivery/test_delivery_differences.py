"""What is said of two values that should have been one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mlops_ray.delivery.differences import describe
from mlops_ray.delivery.environment import environment_changes


def test_rows_that_differ_are_counted_and_shown() -> None:
    then = pa.table({"a": [1, 2, 3], "x": [0.5, None, float("nan")]})
    now = pa.table({"a": [1, 5, 3], "x": [0.5, 1.5, float("nan")]})
    assert describe("table", then, now) == [
        "column a: 1 of 3 rows differ",
        "  row 1: 2 then, 5 now",
        "column x: 1 of 3 rows differ",
        "  row 1: null then, 1.5 now",
    ]


def test_columns_types_and_counts() -> None:
    then = pa.table({"a": [1, 2], "b": [1, 2]})
    now = pa.table({"a": [1.0, 2.0, 3.0], "c": [1, 2, 3]})
    assert describe("table", then, now) == [
        'column a: "int64" then, "double" now',
        "column b: only then",
        "column c: only now",
        "2 rows then, 3 now",
    ]


def test_the_path_to_a_value_in_json() -> None:
    then = {"auc": 0.7, "slices": [{"rows": 3}, {"rows": 4}], "gone": 1}
    now = {"auc": 0.6, "slices": [{"rows": 3}, {"rows": 5}]}
    assert describe("json", then, now) == [
        "auc: 0.7 then, 0.6 now",
        "slices[1].rows: 4 then, 5 now",
        "gone: only then",
    ]
    assert describe("json", 1, 2) == ["1 then, 2 now"]


def test_files_and_what_is_in_them(tmp_path: Path) -> None:
    weights = {"w": np.zeros(4, np.float32), "b": np.ones(2, np.float32)}
    for name, auc, change in (("then", 0.7, 0.0), ("now", 0.8, 0.25)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "package.json").write_text(json.dumps({"training": {"auc": auc}}))
        save_file(weights | {"w": weights["w"] + change}, folder / "weights.safetensors")
        (folder / "same.txt").write_text("same")
    (tmp_path / "now" / "new.txt").write_text("")
    assert describe("tree", tmp_path / "then", tmp_path / "now") == [
        "new.txt: only now",
        "package.json: other bytes",
        "  training.auc: 0.7 then, 0.8 now",
        "weights.safetensors: other bytes",
        "  w: 4 of 4 values differ, by at most 0.25",
    ]


def test_tensors_of_other_shapes_and_bits() -> None:
    then = {"a": np.array([0.0]), "b": np.zeros(2), "c": np.zeros(1)}
    now = {"a": np.array([-0.0]), "b": np.zeros(3), "d": np.zeros(1)}
    lines = describe("tensors", then, now)
    assert lines[0].startswith("a: 1 of 1 values differ")
    assert lines[1:] == ["b: float64[2] then, float64[3] now", "c: only then", "d: only now"]


def test_no_more_lines_than_one_reads() -> None:
    lines = describe("json", dict.fromkeys(map(str, range(50)), 0), {})
    assert len(lines) == 13
    assert lines[-1] == "…"


values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values, values)
def test_something_is_said_exactly_where_json_differs(then: Any, now: Any) -> None:
    same = json.dumps(then, sort_keys=True) == json.dumps(now, sort_keys=True)
    assert (describe("json", then, now) == []) == same


cells = st.lists(st.none() | st.floats(width=16), min_size=3, max_size=3)


@given(cells, cells)
def test_something_is_said_exactly_where_a_column_differs(then: list[Any], now: list[Any]) -> None:
    # Values that are equal and have other bits (0.0 and -0.0) are equal to Arrow.
    def known(value: Any) -> Any:
        return None if value is None else "nan" if value != value else value + 0.0

    same = [known(v) for v in then] == [known(v) for v in now]
    tables = [pa.table({"x": pa.array(column, pa.float64())}) for column in (then, now)]
    assert (describe("table", *tables) == []) == same


# The environment

THEN = {
    "python": "3.11.9",
    "lock_digest": "a",
    "packages": {"torch": "2.13.0", "ray": "2.60.0"},
    "machine": {"cpu": "X", "processor": "x86_64", "gpus": []},
}


def test_the_same_environment_is_the_same() -> None:
    assert environment_changes(THEN, THEN) == []


@pytest.mark.parametrize(
    ("change", "said", "matters"),
    [
        ({"python": "3.12.1"}, "Python: 3.11.9 then, 3.12.1 now", True),
        ({"packages": {"torch": "2.14", "ray": "2.60.0"}}, "torch: 2.13.0 then, 2.14 now", True),
        ({"packages": {"torch": "2.13.0"}}, "ray: 2.60.0 then, not installed now", True),
        (
            {"packages": {"Torch": "2.13.0", "ray": "2.60.0", "a_b": "1"}},
            "a-b: not installed then, 1 now",
            False,
        ),
        ({"lock_digest": "b"}, "lock file: a then, b now", False),
        ({"machine": {**THEN["machine"], "cpu": "Y"}}, "CPU: X then, Y now", True),  # type: ignore[dict-item]
        ({"machine": {**THEN["machine"], "gpus": ["H"]}}, "GPUs: none then, H now", True),  # type: ignore[dict-item]
    ],
)
def test_what_is_different_is_told(change: dict[str, Any], said: str, matters: bool) -> None:
    (found,) = environment_changes(THEN, THEN | change)
    assert (str(found), found.matters) == (said, matters)


def test_another_lock_file_matters_where_packages_are_not_known() -> None:
    then = {"lock_digest": "a", "python": "3.11.9"}
    (found,) = environment_changes(then, then | {"lock_digest": "b"})
    assert found.matters
