"""Artifacts: what goes in comes out, equal content is kept once, damage is found."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.errors import ArtifactError
from mlops_ray.metadata.artifacts import ArtifactStore
from mlops_ray.metadata.digest import canonical_json, digest_json, digest_tree
from mlops_ray.metadata.types import GateDecision

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_a_table_comes_back_memory_mapped_and_equal(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    table = pa.table({"a": [1, 2, None], "b": ["x", None, "é"]})
    ref = store.put(table)
    before = pa.total_allocated_bytes()
    back = store.get(ref)
    assert back.equals(table)
    assert ref.rows == 3
    assert pa.total_allocated_bytes() - before < 1000


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_equal_tables_have_one_digest_however_they_are_chunked(tmp_path: Path, chunks: int) -> None:
    whole = pa.table({"a": list(range(6))})
    size = 6 // chunks
    parts = pa.concat_tables([whole.slice(i * size, size) for i in range(chunks)])
    assert ArtifactStore(tmp_path).put(parts) == ArtifactStore(tmp_path).put(whole)
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1


def test_folders_files_and_models(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/file").write_bytes(b"1")
    back = store.get(store.put(folder))
    assert (back / "deep/file").read_bytes() == b"1"
    file = store.get(store.put(folder / "deep/file"))
    assert file.read_bytes() == b"1"
    decision = GateDecision(passed=True, reason="better", evidence={"auc": 0.7})
    assert GateDecision.model_validate(store.get(store.put(decision))) == decision


@given(JSON)
def test_any_json_value_comes_back(value: Any) -> None:
    import json

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


def test_damage_and_loss_are_found(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    ref = store.put({"a": 1})
    assert store.verify(ref)
    store.path(ref.digest).write_bytes(b"{}")
    assert not store.verify(ref)
    store.discard(ref.digest)
    assert not store.verify(ref)
    with pytest.raises(ArtifactError, match="missing"):
        store.get(ref)


def test_a_type_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="type set"):
        ArtifactStore(tmp_path).put({1, 2})


_FULL_DISK = """
import sys, pyarrow as pa
from pathlib import Path
from mlops_ray.errors import ArtifactError
from mlops_ray.metadata.artifacts import ArtifactStore
store = ArtifactStore(Path(sys.argv[1]))
kept = store.put({"small": 1})
try:
    store.put(pa.table({"a": list(range(2_000_000))}))
except ArtifactError as error:
    assert "No space left" in str(error), error
    assert store.get(kept) == {"small": 1}
    assert [p.name for p in Path(sys.argv[1]).iterdir() if p.name.startswith(".incoming")] == []
    print("refused")
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or sys.platform != "linux", reason="a small file system needs root to mount"
)
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = f"mount -t tmpfs -o size=4m none {tmp_path} && exec {sys.executable} -c '{_FULL_DISK}'"
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", f"{script} {tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "refused", done.stderr
