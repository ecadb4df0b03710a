"""What is said of two values that should have been one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import torch as torch_file
from safetensors.numpy import save_file

from mlops_ray.delivery import verdict
from mlops_ray.delivery.differences import describe
from mlops_ray.delivery.environment import environment_changes
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.home import Home


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


def test_columns_that_arrow_does_not_compare() -> None:
    for then, now in (([[1], [2]], [[1], [3]]), ([{"x": 1}, {"x": 2}], [{"x": 1}, {"x": 3}])):
        lines = describe("table", pa.table({"a": then}), pa.table({"a": now}))
        assert lines[0] == "column a: 1 of 2 rows differ"
        assert lines[1].startswith("  row 1: ")


def test_columns_of_one_name() -> None:
    then, now = (pa.table([pa.array([1]), pa.array([value])], names=["a", "a"]) for value in (2, 3))
    assert describe("table", then, now) == [
        "column a (2): 1 of 1 rows differ",
        "  row 0: 2 then, 3 now",
    ]


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (np.array([1.0]), np.array([2.0]), "1 of 1 values differ, by at most 1"),
        (
            np.array([2j], np.complex64),
            np.array([3j], np.complex64),
            "1 of 1 values differ, by at most 1",
        ),
        (
            np.array([2**63], np.uint64),
            np.array([2**63 + 1], np.uint64),
            "1 of 1 values differ, by at most 1",
        ),
        (np.array([True, False]), np.array([True, True]), "1 of 2 values differ, by at most 1"),
        (np.zeros((0, 2)), np.zeros((0, 3)), "float64[0, 2] then, float64[0, 3] now"),
        (torch.tensor([1.0]), torch.tensor([3.0]), "1 of 1 values differ, by at most 2"),
        (
            torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
            torch.tensor([1.0, 4.0], dtype=torch.bfloat16),
            "1 of 2 values differ, by at most 2",
        ),
    ],
)
def test_tensors_of_every_kind(tmp_path: Path, then: Any, now: Any, said: str) -> None:
    assert describe("tensors", then, now) == [said]
    assert describe("tensors", {"w": then}, {"w": now}) == [f"w: {said}"]
    assert describe("tensors", {"w": then}, {"w": then}) == []
    for name, value in (("then", then), ("now", now)):
        (tmp_path / name).mkdir()
        save = torch_file.save_file if isinstance(value, torch.Tensor) else save_file
        save({"w": value}, tmp_path / name / "w.safetensors")
    lines = describe("tree", tmp_path / "then", tmp_path / "now")
    assert lines == ["w.safetensors: other bytes", f"  w: {said}"]


def test_what_cannot_be_described_is_said_and_no_more(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_values: Any) -> list[str]:
        raise TypeError("no such type")

    monkeypatch.setattr(verdict, "describe", fail)
    clean = Home(tmp_path / "clean")
    refs = [open_artifacts(at).put({"a": number}) for number, at in enumerate((home, clean))]
    lines = verdict._lines(home, refs[0], clean, refs[1])
    assert lines == ("cannot be compared: TypeError: no such type",)


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
