"""Digests: equal values have one, others have another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.metadata.digest import canonical_json, digest_file, digest_json, digest_tree

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_any_json_value_comes_back(value: Any) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), max_size=8))
def test_digests_do_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert digest_json(value) == digest_json(dict(reversed(value.items())))


def test_values_that_differ_have_digests_that_differ() -> None:
    values = [1, "1", True, None, [1], {"1": 1}, 1.5, math.inf, [[1]], ""]
    assert len({digest_json(value) for value in values}) == len(values)


def test_moving_bytes_between_files_changes_a_tree(tmp_path: Path) -> None:
    for name, files in {"x": {"a": "12", "b": ""}, "y": {"a": "1", "b": "2"}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    assert digest_tree(tmp_path / "x") != digest_tree(tmp_path / "y")


def test_a_file_that_was_replaced_within_a_clock_tick_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    seen = set()
    for number in range(50):
        file.write_bytes(b"%02d" % number)
        seen.add(digest_file(file))
    assert len(seen) == 50
