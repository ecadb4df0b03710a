"""What is special about the embedded online store."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from features.online_samples import TYPED, declare, get, keys, put, row

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.online import NOT_FOUND, PRESENT, open_online

FEATURES = declare()
ABSENT = [NOT_FOUND] * len(TYPED)


def test_a_folder_that_was_removed_is_opened_anew(tmp_path: Path) -> None:
    folder = tmp_path / "online"
    put(open_online(FEATURES, folder, "p"), FEATURES, row(100))
    shutil.rmtree(folder)
    with pytest.raises(FeatureStoreError, match="no online store yet"):
        open_online(FEATURES, folder, "p", readonly=True)
    again = open_online(FEATURES, folder, "p")
    assert get(again, 100)[1] == ABSENT
    put(again, FEATURES, row(100, price=3.0))
    assert (folder / "data.mdb").exists()
    assert get(open_online(FEATURES, folder, "p"), 100)[0]["price"] == 3.0


HANG = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from features.online_samples import declare, get, put, row
from mlops_ray.features.online import open_online
store = open_online(declare(), Path({folder!r}), "p", readonly={reader})
if {reader}:
    transaction = store._environment.lmdb.begin()
    print("ready", flush=True)
    time.sleep(60)
with store.batch():
    put(store, declare(), row(200, price=9.0))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("reader", [False, True])
def test_a_process_killed_in_the_middle_leaves_it_usable(tmp_path: Path, reader: bool) -> None:
    folder = tmp_path / "online"
    store = open_online(FEATURES, folder, "p")
    put(store, FEATURES, row(100, price=1.0))
    tests = str(Path(__file__).parents[1])
    code = HANG.format(path=[tests], folder=str(folder), reader=reader)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert get(store, 1000)[0]["price"] == 1.0
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    began = time.monotonic()
    put(store, FEATURES, row(101, price=2.0))
    assert time.monotonic() - began < 30
    assert get(store, 1000)[0]["price"] == 2.0
    if reader:
        # Its place in the table of readers is given back, or old pages could never be used again.
        environment = open_online(FEATURES, folder, "p")._environment.lmdb  # type: ignore[attr-defined]
        assert environment.reader_check() == 1


def test_a_row_of_an_unknown_layout_is_an_error(tmp_path: Path) -> None:
    store = open_online(FEATURES, tmp_path, "p")
    put(store, FEATURES, row(100))
    environment = store._environment.lmdb  # type: ignore[attr-defined]
    with environment.begin(write=True) as transaction:
        for key, value in transaction.cursor():
            if key.startswith(b"v"):
                transaction.put(key, b"unknown!" + value[8:])
    with pytest.raises(FeatureStoreError, match="a layout that the store does not know"):
        store.read_matrix("thing", keys(("north", 1)), np.array([100]))


def test_a_full_disk_is_said_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlops_ray.features.online.environment._MAP_BYTES", 200_000)
    store = open_online(FEATURES, tmp_path, "p")
    put(store, FEATURES, row(100))
    many = [row(101, key=("north", shelf), note="x" * 500) for shelf in range(2000)]
    with pytest.raises(FeatureStoreError, match=r"(?s)cannot be written.*MDB_MAP_FULL"):
        put(store, FEATURES, *many)
    assert get(store, 1000)[1] == [PRESENT] * len(TYPED)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(FeatureStoreError, match="cannot be opened") as caught:
        open_online(FEATURES, tmp_path, "p")
    assert isinstance(caught.value.__cause__, lmdb.Error)


def test_opening_for_writing_ends_no_read_of_the_process(tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "copied"
    put(open_online(FEATURES, made, "p"), FEATURES, row(100, price=1.0))
    # So that this process has not opened it for writing.
    shutil.copytree(made, folder)
    reader = open_online(FEATURES, folder, "p", readonly=True)
    reading = reader._environment.lmdb.begin()  # type: ignore[attr-defined]
    put(open_online(FEATURES, folder, "p"), FEATURES, row(101, price=2.0))
    assert reading.stat()["entries"] == 2
    assert get(reader, 1000)[0]["price"] == 2.0
    shutil.rmtree(folder)
    open_online(FEATURES, folder, "p")
    assert reading.stat()["entries"] == 2
    assert get(reader, 1000)[1] == ABSENT
