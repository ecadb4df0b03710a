"""Artifacts, in a folder and in a bucket: what goes in comes out, equal content is kept once, damage
is found."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from faults import kill_put
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata import stores
from metadata.stores import address, open_store, start_server

from mlops_ray.errors import ArtifactError, StorageError
from mlops_ray.metadata import digest as digests
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore, open_artifacts
from mlops_ray.metadata.bucket import BucketBlobs
from mlops_ray.metadata.folder import FolderBlobs
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.retention import collect, judge
from mlops_ray.metadata.types import GateDecision


class Split(NamedTuple):
    train: int
    test: int


@dataclasses.dataclass
class Point:
    x: float
    name: str | None = None


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server, endpoint = start_server()
    yield endpoint
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return address(request.getfixturevalue("s3"), tmp_path.name)


@pytest.fixture
def store(where: str, tmp_path: Path) -> ArtifactStore:
    return open_store(where, tmp_path / "cache")


def elsewhere(where: str, tmp_path: Path) -> ArtifactStore:
    """The same store, as another machine sees it."""
    return open_store(where, tmp_path / "another cache")


def damage(store: ArtifactStore, ref: ArtifactRef, data: bytes | None = None) -> None:
    """Overwrite what is stored with other bytes of the same size; None flips a bit."""
    path = store.path(ref.digest)
    path = path if path.is_file() else next(f for f in path.rglob("*") if f.is_file())
    whole = path.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1]) if data is None else data
    files = getattr(store.blobs, "_files", None)
    if files is None:
        path.write_bytes(changed)
        return
    key = store.blobs._key(digests.digest_bytes(whole))
    with files.open_output_stream(key) as sink:
        sink.write(changed)
    shutil.rmtree(store.blobs._cache.root)


def test_a_table_comes_back_memory_mapped_and_equal(store: ArtifactStore) -> None:
    table = pa.table({"a": [1, 2, None], "b": ["x", None, "é"], "c": [True, None, False]})
    ref = store.put(table)
    before = pa.total_allocated_bytes()
    back = store.get(ref)
    assert back.equals(table)
    assert back.schema.equals(table.schema)
    assert (ref.kind, ref.rows) == ("table", 3)
    assert pa.total_allocated_bytes() - before < 1000


def test_a_large_table_goes_by_a_file(store: ArtifactStore) -> None:
    table = pa.table({"a": np.arange(2_000_000), "b": np.arange(2_000_000) % 7 == 0})
    ref = store.put(table)
    assert ref.size > table.nbytes
    assert store.get(ref).equals(table)
    assert store.verify(ref)


COLUMNS = st.lists(
    st.fixed_dictionaries(
        {
            "i": st.none() | st.integers(-(2**31), 2**31 - 1),
            "b": st.none() | st.booleans(),
            "s": st.none() | st.text(max_size=3),
            "l": st.none() | st.lists(st.none() | st.booleans(), max_size=2),
            "f": st.floats(allow_nan=False),
        }
    ),
    min_size=1,
    max_size=20,
)
SCHEMA = pa.schema(
    {
        "i": pa.int32(),
        "b": pa.bool_(),
        "s": pa.string(),
        "l": pa.list_(pa.bool_()),
        "f": pa.float64(),
    }
)


@settings(max_examples=60, deadline=None)
@given(rows=COLUMNS, more=COLUMNS, cut=st.integers(0, 20))
def test_equal_tables_have_one_digest_however_they_were_made(
    rows: list[dict[str, Any]], more: list[dict[str, Any]], cut: int
) -> None:
    from mlops_ray.metadata.codecs import encode

    plain = pa.Table.from_pylist(rows, SCHEMA)
    sliced = pa.Table.from_pylist([*more, *rows, *more], SCHEMA).slice(len(more), len(rows))
    chunks = pa.concat_tables([plain.slice(0, cut), plain.slice(cut)])
    loose = plain.set_column(0, SCHEMA.field("i"), _with_garbage(plain.column("i")))
    for other in (sliced, chunks, loose):
        assert other.equals(plain)
        assert encode(other).data == encode(plain).data


def _with_garbage(column: pa.ChunkedArray) -> pa.Array:
    """The same values, with other bytes where they are null."""
    values = np.array([7 if v is None else v for v in column.to_pylist()], dtype=np.int32)
    mask = np.packbits([v is not None for v in column.to_pylist()], bitorder="little")
    buffers = [pa.py_buffer(mask.tobytes()), pa.py_buffer(values.tobytes())]
    return pa.Array.from_buffers(pa.int32(), len(values), buffers)


def test_folders_and_files(store: ArtifactStore, where: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/file").write_bytes(b"1")
    (folder / "deep/twin").write_bytes(b"1")
    (folder / "empty").write_bytes(b"")
    tree, file = store.put(folder), store.put(folder / "deep/er/file")
    for reader in (store, elsewhere(where, tmp_path)):
        back = reader.get(tree)
        found = {str(f.relative_to(back)): f.read_bytes() for f in back.rglob("*") if f.is_file()}
        assert found == {"deep/er/file": b"1", "deep/twin": b"1", "empty": b""}
        assert reader.get(file).read_bytes() == b"1"
        assert reader.verify(tree)
        assert reader.verify(file)
    assert tree.size == 2
    assert tree.digest == digests.digest_tree(folder)
    with pytest.raises(ArtifactError, match="no such file"):
        store.put(tmp_path / "nothing")


DTYPES = ["bfloat16", "float16", "float32", "float64", "int8", "int64", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_come_back_bit_for_bit(store: ArtifactStore, dtype: str) -> None:
    kind = getattr(torch, dtype)
    weights = (torch.randn(4, 6) * 50).to(kind)
    state = {"w": weights, "tied": weights, "across": weights.T, "none": torch.zeros(0, 3).to(kind)}
    ref = store.put(state)
    back = store.get(ref)
    assert ref.kind == "tensors"
    for name, tensor in state.items():
        assert back[name].dtype == kind
        assert torch.equal(back[name], tensor)
    assert store.put(dict(reversed(state.items()))) == ref


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "i1", "u8", "?"])
def test_arrays_come_back_bit_for_bit(store: ArtifactStore, dtype: str) -> None:
    array = np.arange(12).reshape(3, 4)[:, ::2].astype(dtype)
    back = store.get(store.put({"a": array, "b": np.asarray(array[0, 0])}))
    np.testing.assert_array_equal(back["a"], array)
    assert back["b"].shape == ()
    np.testing.assert_array_equal(store.get(store.put(array)), array)


def test_numbers_that_are_none_of_numpys_survive(store: ArtifactStore) -> None:
    odd = np.array([np.nan, -np.nan, np.inf, -0.0, 5e-324])
    assert store.get(store.put(odd)).tobytes() == odd.tobytes()
    one = torch.tensor(1.5, dtype=torch.bfloat16)
    assert torch.equal(store.get(store.put(one)), one)


def test_a_large_state_goes_by_a_file(store: ArtifactStore) -> None:
    state = {"w": torch.arange(3_000_000, dtype=torch.float32)}
    assert torch.equal(store.get(store.put(state))["w"], state["w"])


def test_records_come_back_as_json(store: ArtifactStore) -> None:
    decision = GateDecision(passed=True, reason="better", evidence={"auc": 0.7})
    assert GateDecision.model_validate(store.get(store.put(decision))) == decision
    assert store.get(store.put(Split(1, 2))) == {"train": 1, "test": 2}
    assert store.get(store.put(Point(0.5))) == {"x": 0.5, "name": None}
    assert store.get(store.put([Split(1, 2), None, "é", [1.5]])) == [
        {"train": 1, "test": 2},
        None,
        "é",
        [1.5],
    ]


def test_lists_of_artifacts(store: ArtifactStore, where: str, tmp_path: Path) -> None:
    tables = [pa.table({"n": [1, 2]}), pa.table({"n": [3]})]
    ref = store.put(tables)
    assert (ref.kind, ref.rows) == ("list", 3)
    assert ref == store.put_list([store.put(table) for table in tables])
    assert [element.rows for element in store.elements(ref)] == [2, 1]
    assert [back.equals(t) for back, t in zip(store.get(ref), tables, strict=True)] == [True, True]
    nested = store.put_list([ref, store.put(1), store.put_list([])])
    assert store.get(nested)[1:] == [1, []]
    assert elsewhere(where, tmp_path).verify(nested)
    assert store.needs(nested) >= {e.digest for e in store.elements(ref)}
    damage(store, store.elements(ref)[1])
    assert not store.verify(nested)


class Odd:
    def __init__(self, value: int) -> None:
        self.value = value


def test_pickle_only_where_it_is_declared(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactError, match=r"Odd cannot be stored[\s\S]*pickle: true") as caught:
        store.put(Odd(1))
    assert not isinstance(caught.value, StorageError)
    ref = store.put({1: {2, 3}, "odd": complex(1, 2)}, pickle=True)
    assert ref.kind == "pickle"
    assert store.get(ref) == {1: {2, 3}, "odd": complex(1, 2)}
    assert store.put({"a": 1}, pickle=True).kind == "json"


def test_what_cannot_be_stored_is_refused_with_a_way_out(store: ArtifactStore) -> None:
    import pandas as pd
    import polars as pl

    with pytest.raises(ArtifactError, match=r"from_pandas"):
        store.put(pd.DataFrame({"a": [1]}))
    with pytest.raises(ArtifactError, match=r"to_arrow"):
        store.put(pl.DataFrame({"a": [1]}))
    for value in (
        {1, 2},
        b"bytes",
        {"a": object()},
        np.array(["text"]),
        {"a": b"1"},
        {"a": np.ones(1), "b": 1},
    ):
        with pytest.raises(ArtifactError, match="cannot be stored"):
            store.put(value)


VALUES: dict[str, Any] = {
    "table": pa.table({"a": list(range(100))}),
    "json": {"a": 1},
    "tensors": {"w": np.arange(9.0)},
    "pickle": {1, 2},
}


@pytest.mark.parametrize("kind", [*VALUES, "tree"])
def test_damage_is_found_and_healed(store: ArtifactStore, kind: str, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"content")
    value = VALUES.get(kind, tmp_path / "tree")
    ref = store.put(value, pickle=True)
    assert ref.kind == kind
    assert store.verify(ref)
    damage(store, ref)
    assert not store.verify(ref)
    if kind not in ("table", "tree"):
        with pytest.raises(ArtifactError, match="corrupt") as caught:
            store.get(ref)
        assert caught.value.digest == ref.digest
    store.discard(ref.digest)
    assert not store.verify(ref)
    with pytest.raises(ArtifactError, match="missing") as caught:
        store.get(ref)
    assert caught.value.digest == ref.digest
    assert store.put(value, pickle=True) == ref
    assert store.verify(ref)


@pytest.mark.parametrize("kind", [*VALUES, "tree"])
def test_a_folder_replaces_what_is_damaged(tmp_path: Path, kind: str) -> None:
    store = open_store(str(tmp_path / "store"), tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"content")
    value = VALUES.get(kind, tmp_path / "tree")
    ref = store.put(value, pickle=True)
    damage(store, ref)
    assert store.put(value, pickle=True) == ref
    assert store.verify(ref)


def test_a_table_that_was_cut_off_is_found_on_reading(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), tmp_path)
    ref = store.put(pa.table({"a": [1, 2]}))
    damage(store, ref, b"short")
    with pytest.raises(ArtifactError, match="corrupt"):
        store.get(ref)


def test_a_hit_reads_a_file_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path), tmp_path)
    ref = store.put({"a": 1})
    path = store.path(ref.digest)
    read: list[str] = []
    real = digests._read_digest
    monkeypatch.setattr(digests, "_read_digest", lambda path: (read.append(path), real(path))[1])
    a_minute_ago = time.time() - 60
    os.utime(path, (a_minute_ago, a_minute_ago))
    assert [store.verify(ref) for _ in range(5)] == [True] * 5
    assert len(read) == 1
    path.write_bytes(b'{"a":2}')
    assert not store.verify(ref)


def test_equal_content_is_not_written_again_but_counts_as_used(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), tmp_path)
    ref = store.put({"a": 1})
    path = store.path(ref.digest)
    long_ago = time.time() - 100_000
    os.utime(path, (long_ago, long_ago))
    inode = path.stat().st_ino
    assert store.put({"a": 1}) == ref
    assert path.stat().st_ino == inode
    assert time.time() - path.stat().st_mtime < 100


def test_a_hit_puts_ageing_objects_anew(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlops_ray.metadata import bucket

    store = open_store(address(s3, tmp_path.name), tmp_path / "cache")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"1")
    refs = [store.put({"a": 1}), store.put(tmp_path / "tree")]
    put: list[str] = []
    real = store.blobs._upload
    monkeypatch.setattr(
        store.blobs, "_upload", lambda key, *more, **how: (put.append(key), real(key, *more, **how))
    )
    assert all(store.verify(ref) for ref in refs)
    assert put == []
    monkeypatch.setattr(bucket, "_ageing", lambda info: True)
    assert all(store.verify(ref) for ref in refs)
    assert len(put) == 3


def test_a_bucket_is_collected_but_not_the_files_of_a_tree_that_is_needed(
    s3: str, tmp_path: Path
) -> None:
    store = open_store(address(s3, tmp_path.name), tmp_path / "cache")
    for name in ("kept", "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared").write_bytes(b"in both")
        (tmp_path / name / "own").write_text(name)
    kept, unused = store.put(tmp_path / "kept"), store.put(tmp_path / "gone")
    needs = dict.fromkeys(store.needs(kept), "it is needed")
    now = datetime.now(UTC)
    plan = list(judge(store.blobs.blobs(), needs, {}, now + timedelta(minutes=1)))
    assert collect(store, plan, timedelta(days=1)) == []
    removed = {verdict.blob.digest for verdict in collect(store, plan, timedelta(minutes=-1))}
    assert removed == {unused.digest, digests.digest_bytes(b"gone")}
    assert open_store(address(s3, tmp_path.name), tmp_path / "other").verify(kept)
    assert not store.verify(unused)


def test_the_cache_of_a_bucket_stays_small(s3: str, tmp_path: Path) -> None:
    store = open_store(address(s3, tmp_path.name), tmp_path / "cache")
    store.blobs._cache_bytes = 3000
    refs = []
    for number in range(10):
        refs.append(store.put("x" * 1000 + str(number)))
        long_ago = time.time() - 100_000 + number
        os.utime(store.path(refs[-1].digest), (long_ago, long_ago))
    left = sum(blob.size for blob in store.blobs._cache.blobs())
    assert left <= 3000
    assert [store.get(ref)[-1] for ref in refs] == list("0123456789")


def test_one_store_takes_from_another(store: ArtifactStore, tmp_path: Path) -> None:
    other = open_store(str(tmp_path / "other"), tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"1")
    given = [store.put({"a": 1}), store.put(tmp_path / "tree"), store.put(VALUES["table"])]
    ref = store.put_list(given)
    other.copy(ref, store)
    assert other.verify(ref)
    assert other.get(given[0]) == {"a": 1}
    damage(store, given[0])
    with pytest.raises(ArtifactError, match="corrupt"):
        open_store(str(tmp_path / "third"), tmp_path).copy(given[0], store)


def test_a_home_names_its_store(s3: str, tmp_path: Path) -> None:
    home = Home(tmp_path, Storage(artifacts=address(s3, tmp_path.name)))
    ref = open_artifacts(home).put({"a": 1})
    assert open_artifacts(Home(tmp_path, home.storage)).get(ref) == {"a": 1}
    assert not home.artifacts.exists()
    shared = Home(tmp_path, Storage(artifacts=f"file://{tmp_path}/shared"))
    assert open_artifacts(shared).path(ref.digest).is_relative_to(tmp_path / "shared")
    with pytest.raises(StorageError, match="cannot be opened"):
        open_artifacts(Home(tmp_path, Storage(artifacts="what://is/this")))


def test_a_bucket_that_is_gone_is_a_clear_error(s3: str, tmp_path: Path) -> None:
    url = address(s3, "x").replace("lake", "no-such-bucket")
    with pytest.raises(StorageError, match="cannot be written"):
        open_store(url, tmp_path).put({"a": 1})


def test_processes_that_put_the_same_at_once(where: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "abc":
        (tree / name).write_text(name)
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    work = [
        context.Process(target=stores.put_all, args=(where, tmp_path / "cache", tree, ready))
        for _ in range(3)
    ]
    for process in work:
        process.start()
    for process in work:
        process.join(60)
        assert process.exitcode == 0
    store = open_store(where, tmp_path / "cache")
    assert all(store.verify(store.put({"number": number})) for number in range(12))
    assert store.verify(store.put(tree))
    objects = {blob.digest for blob in store.blobs.blobs()}
    assert len(objects) == (13 if where.startswith("/") else 16)
    assert not list(tmp_path.rglob(".incoming-*"))


_FULL_DISK = """
import sys, pyarrow as pa
from pathlib import Path
from mlops_ray.errors import StorageError
from mlops_ray.metadata.artifacts import ArtifactStore
from mlops_ray.metadata.folder import FolderBlobs
store = ArtifactStore(FolderBlobs(Path(sys.argv[1])))
kept = store.put({"small": 1})
tree = Path(sys.argv[2])
for value in (pa.table({"a": list(range(2_000_000))}), "x" * 5_000_000, tree):
    try:
        store.put(value)
        raise SystemExit("was stored")
    except StorageError as error:
        assert "No space left" in str(error), error
    assert store.get(kept) == {"small": 1}
    assert [p.name for p in Path(sys.argv[1]).iterdir() if p.name.startswith(".incoming")] == []
print("refused")
"""

_READ_ONLY = """
import sys
from pathlib import Path
from mlops_ray.errors import StorageError
from mlops_ray.metadata.artifacts import ArtifactStore
from mlops_ray.metadata.folder import FolderBlobs
store = ArtifactStore(FolderBlobs(Path(sys.argv[1])))
import subprocess, os
kept = store.put({"small": 1})
os.utime(store.path(kept.digest), (1, 1))
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
assert store.verify(kept) and store.get(kept) == {"small": 1} and store.put({"small": 1}) == kept
try:
    store.put({"other": 1})
except StorageError as error:
    assert "Read-only" in str(error), error
    print("refused")
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or sys.platform != "linux", reason="a small file system needs root to mount"
)
@pytest.mark.parametrize("script", [_FULL_DISK, _READ_ONLY], ids=["full", "read-only"])
def test_a_disk_that_takes_no_more(tmp_path: Path, script: str) -> None:
    disk, tree = tmp_path / "disk", tmp_path / "tree"
    disk.mkdir()
    tree.mkdir()
    (tree / "large").write_bytes(os.urandom(6_000_000))
    (tmp_path / "script.py").write_text(script)
    run = f"mount -t tmpfs -o size=4m none {disk} && exec {sys.executable} {tmp_path}/script.py"
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", f"{run} {disk} {tree}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "refused", done.stderr


def test_a_kill_leaves_no_half_artifact(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent)]))
    said = kill_put.run(tmp_path, where, kills=3)
    assert said.startswith("3 kills")


def test_a_folder_and_the_value_that_lists_it_are_two_things(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("1")
    store = ArtifactStore(FolderBlobs(tmp_path / "store"))
    listing = digests.file_digests(tmp_path / "folder")
    folder, value = store.put(tmp_path / "folder"), store.put(listing)
    assert folder.digest != value.digest
    assert (store.get(folder) / "file").read_text() == "1"
    assert store.get(value) == listing


@pytest.mark.parametrize("call", ["utime", "digest_tree"])
def test_what_is_collected_while_it_is_put_is_there_afterwards(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlops_ray.metadata import folder

    store = ArtifactStore(FolderBlobs(tmp_path))
    ref = store.put({"a": 1})
    os.utime(store.path(ref.digest), (1, 1))
    place = os if call == "utime" else folder
    real = getattr(place, call)

    def late(path: Path, *arguments: Any) -> Any:
        FolderBlobs(tmp_path).collect(ref.digest, datetime.now(UTC) - timedelta(days=1))
        return real(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(place, call, late)
        assert store.put({"a": 1}) == ref
    assert store.get(ref) == {"a": 1}


def test_a_second_put_waits_until_the_first_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlops_ray.metadata import folder

    store = ArtifactStore(FolderBlobs(tmp_path))
    store.put({"a": 1})
    synced: list[Path] = []
    monkeypatch.setattr(folder, "sync", synced.append)
    ref = store.put({"a": 1})
    assert synced == [store.path(ref.digest).parent]


def test_folders_with_links_to_nothing_or_to_themselves_are_refused(tmp_path: Path) -> None:
    store = ArtifactStore(FolderBlobs(tmp_path / "store"))
    for name, target in (("nothing", "/nowhere"), ("itself", ".")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
        (tmp_path / name / "link").symlink_to(target)
        with pytest.raises(ArtifactError, match="a folder cannot be stored") as caught:
            store.put(tmp_path / name)
        assert caught.value.where == str(tmp_path / name / "link")


def test_foreign_objects_are_not_ours(tmp_path: Path) -> None:
    from pyarrow import fs

    bucket = tmp_path / "bucket"
    for number in range(256):
        (bucket / f"{number:02x}").mkdir(parents=True)
    store = ArtifactStore(BucketBlobs(fs.LocalFileSystem(), str(bucket), tmp_path / "cache"))
    ref = store.put({"a": 1})
    (bucket / "reports").mkdir()
    (bucket / "reports/q3.parquet").write_bytes(b"1")
    (bucket / "reports" / ("0" * 64)).write_bytes(b"1")
    store.blobs.mark("run")
    assert [blob.digest for blob in store.stored()] == [ref.digest]
    assert store.blobs.owner() == "run"


def test_a_store_that_cannot_be_reached_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(FolderBlobs(tmp_path))

    def refuse() -> Any:
        raise OSError("no route")

    monkeypatch.setattr(store.blobs, "blobs", refuse)
    with pytest.raises(StorageError, match="cannot be read"):
        store.stored()


def test_the_address_of_a_shared_folder_is_decoded(tmp_path: Path) -> None:
    shared = tmp_path / "a b"
    storage = Storage(artifacts=f"file://{str(shared).replace(' ', '%20')}")
    open_artifacts(Home(tmp_path, storage)).put(1)
    assert shared.is_dir()
