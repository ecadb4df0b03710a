"""Tables in a folder: equal rows are equal bytes, however they came in."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.errors import SourceError
from mlops_ray.features import tables
from mlops_ray.features.tables import read_tables, write_table, write_tables


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 30))
def test_any_batches_give_the_bytes_of_the_table(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    total = sum(sizes)
    whole = pa.table({"n": list(range(total)), "word": [f"w{n % 7}" for n in range(total)]})
    whole = whole.cast(pa.schema([("n", pa.int64()), ("word", pa.string())]))
    batches, start = [], 0
    for size in sizes:
        batches += whole.slice(start, size).to_batches()
        start += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_CHUNK_ROWS", chunk)
        write_tables(folder / "whole", {"t": whole})
        assert write_table(folder / "batches", "t", batches, whole.schema) == total
    assert (folder / "whole/t.arrow").read_bytes() == (folder / "batches/t.arrow").read_bytes()
    assert read_tables(folder / "batches")["t"].equals(whole)


def test_a_type_that_is_learnt_late_is_that_of_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "_CHUNK_ROWS", 2)
    batches = [
        pa.record_batch({"a": pa.nulls(3), "b": [1, 2, 3]}),
        pa.record_batch({"a": pa.nulls(1), "b": [4]}),
        pa.record_batch({"a": ["x"], "b": [5]}),
        pa.record_batch({"b": [6], "c": [0.5]}),
    ]
    write_table(tmp_path, "t", batches, batches[0].schema)
    table = read_tables(tmp_path)["t"]
    assert table["a"].to_pylist() == [None] * 4 + ["x", None]
    assert table["b"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert table["c"].to_pylist() == [None] * 5 + [0.5]
    assert [file.name for file in tmp_path.iterdir()] == ["t.arrow"]


def test_types_that_do_not_agree_are_named(tmp_path: Path) -> None:
    batches = [pa.record_batch({"a": [1]}), pa.record_batch({"a": ["x"]})]
    with pytest.raises(SourceError, match=r"do not share one schema[\s\S]*a: string"):
        write_table(tmp_path, "t", batches, batches[0].schema)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no tables in this folder"):
        read_tables(tmp_path)
