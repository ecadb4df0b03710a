"""Answers as JSON and as Arrow: the same content."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.serving.formats.answers import Answer, arrow_answer, json_answer

rows = st.lists(
    st.tuples(st.text(min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 1)),
    min_size=1,
    max_size=5,
)


def answer_of(found: list[tuple[str, float, int]], **more: Any) -> Answer:
    ids, scores, labels = (list(column) for column in zip(*found, strict=True))
    given_: dict[str, Any] = {"version": 3, "route": "champion", **more}
    return Answer("shop", ids=ids, scores=np.array(scores), labels=labels, **given_)


@settings(deadline=None)
@given(rows)
def test_json_holds_the_answer_exactly(found: list[tuple[str, float, int]]) -> None:
    content = json.loads(json_answer(answer_of(found)))
    assert (content["model"], content["version"], content["route"]) == ("shop", 3, "champion")
    assert list(zip(content["ids"], content["scores"], content["labels"], strict=True)) == found
    assert "versions" not in content


@settings(deadline=None)
@given(rows)
def test_arrow_holds_the_same(found: list[tuple[str, float, int]]) -> None:
    table = pa.ipc.open_stream(arrow_answer(answer_of(found))).read_all()
    assert table.column_names == ["id", "score", "label", "version", "route"]
    assert table.schema.metadata == {b"model": b"shop"}
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (*row, 3, "champion") for row in found
    ]


def test_rows_of_several_versions() -> None:
    answer = answer_of(
        [("a", 0.5, 1), ("b", 0.25, 0)],
        version=None,
        route=None,
        versions=[3, 4],
        routes=["champion", "rival"],
    )
    content = json.loads(json_answer(answer))
    assert (content["version"], content["route"]) == (None, None)
    assert (content["versions"], content["routes"]) == ([3, 4], ["champion", "rival"])
    table = pa.ipc.open_stream(arrow_answer(answer)).read_all()
    assert table["version"].to_pylist() == [3, 4]
    assert table["route"].to_pylist() == ["champion", "rival"]
