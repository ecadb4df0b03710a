"""Compaction: each row in the tables once, whoever does it, and files gone when nobody needs them."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from serving.log_samples import AT_US, INPUTS, answered, open_log

from mlops_ray.config.features import RequestField
from mlops_ray.config.serving import PredictionLog as Settings
from mlops_ray.errors import ServingError
from mlops_ray.metadata.prediction_log.layout import (
    KINDS,
    replica_folder,
    segments,
    table_folder,
)
from mlops_ray.metadata.prediction_log.news import keep_from, read_news
from mlops_ray.metadata.prediction_log.reading import read_labels, read_predictions
from mlops_ray.metadata.prediction_log.tables import (
    open_table,
    read_positions,
    remove_old_positions,
)
from mlops_ray.serving.formats.feedback import Feedback
from mlops_ray.serving.log import compaction
from mlops_ray.serving.log.compaction import Compacted, compact, optimize
from mlops_ray.serving.log.prediction_log import PredictionLog


def write(folder: Path, *groups: list[str], replica: str = "r", **settings: Any) -> None:
    """Write each group as a frame, and a label for each of its ids; then let go of the files."""

    async def go() -> None:
        log = open_log(folder, replica, **settings)
        for ids in groups:
            log.add(answered(ids))
            log.add_labels(Feedback(ids, [1] * len(ids), [AT_US] * len(ids)))
            await log.flush()
        await log.close()

    asyncio.run(go())


def stored(folder: Path, kind: Any = "predictions") -> list[str]:
    """The ids in a Delta table, as another reader of Delta sees them."""
    path = table_folder(folder, kind)
    frame = polars.read_delta(str(path)) if path.exists() else polars.DataFrame({"id": []})
    return sorted(frame["id"].to_list())


def files(folder: Path) -> int:
    return sum(len(found) for found in segments(folder).values())


def test_rows_move_into_tables_by_day_and_files_go(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"], ["c"])
    write(tmp_path, ["d"], replica="other")
    before = read_predictions(tmp_path)
    done = compact(tmp_path)
    assert done == Compacted({"predictions": 4, "labels": 4}, files_removed=2, days_removed=0)
    assert stored(tmp_path) == stored(tmp_path, "labels") == ["a", "b", "c", "d"]
    assert read_predictions(tmp_path).equals(before)
    (day,) = {str(row["day"]) for row in DeltaTable(tmp_path / "tables/predictions").partitions()}
    assert day == before["received"][0].as_py().date().isoformat()
    assert files(tmp_path) == 0
    again = compact(tmp_path)
    assert again is not None
    assert again.rows == {"predictions": 0, "labels": 0}


def test_what_is_still_written_to_is_taken_and_stays(tmp_path: Path) -> None:
    async def go() -> None:
        log = open_log(tmp_path)
        log.add(answered(["a"]))
        await log.flush()
        assert compact(tmp_path) is not None
        assert (stored(tmp_path), files(tmp_path)) == (["a"], 1)
        log.add(answered(["b"]))
        await log.flush()
        assert read_predictions(tmp_path)["id"].to_pylist() == ["a", "b"]
        await log.close()

    asyncio.run(go())
    assert compact(tmp_path) is not None
    assert (stored(tmp_path), files(tmp_path)) == (["a", "b"], 0)


@pytest.mark.parametrize("at", ["_append", "_sync_commit", "_remove_segments"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2])
def test_ended_anywhere_it_goes_on_without_loss_or_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, after: bool, call: int
) -> None:
    monkeypatch.setattr(compaction, "_BATCH_BYTES", 1)
    write(tmp_path, ["a", "b"], ["c"])
    write(tmp_path, ["d"], replica="other")
    with monkeypatch.context() as patch:
        patch.setattr(compaction, at, ending(getattr(compaction, at), after, call))
        try:
            compact(tmp_path)
        except KeyboardInterrupt:
            ended = True
        else:
            ended = False
    assert ended == (at != "_remove_segments" or call == 1)
    assert sorted(read_predictions(tmp_path)["id"].to_pylist()) == ["a", "b", "c", "d"]
    assert compact(tmp_path) is not None
    assert stored(tmp_path) == stored(tmp_path, "labels") == ["a", "b", "c", "d"]
    assert files(tmp_path) == 0


def ending(function: Callable[..., Any], after: bool, call: int) -> Callable[..., Any]:
    """The function, but the given call of it ends with an interrupt: before it or behind it."""
    calls = 0

    def wrapped(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise KeyboardInterrupt
        found = function(*arguments)
        if calls == call:
            raise KeyboardInterrupt
        return found

    return wrapped


def test_only_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["a"])
    inside, go_on = threading.Event(), threading.Event()
    real = compaction._remove_segments

    def wait(*arguments: Any) -> None:
        inside.set()
        assert go_on.wait(30)
        real(*arguments)

    monkeypatch.setattr(compaction, "_remove_segments", wait)
    first = threading.Thread(target=compact, args=(tmp_path,))
    first.start()
    assert inside.wait(30)
    assert compact(tmp_path) is None
    go_on.set()
    first.join()
    assert stored(tmp_path) == ["a"]


def test_without_the_lock_a_second_one_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system whose locks do not reach other machines."""
    write(tmp_path, ["a"], ["b"])
    real = compaction._append
    monkeypatch.setattr(compaction, "try_lock", lambda file: True)
    lost: list[type] = []

    def second(table: Any, folder: Path, kind: Any, batch: Any) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(compaction, "_append", real)
            assert compact(tmp_path) is not None
        try:
            return real(table, folder, kind, batch)
        except CommitFailedError as error:
            lost.append(type(error))
            raise

    monkeypatch.setattr(compaction, "_append", second)
    assert compact(tmp_path) is not None
    assert lost
    assert stored(tmp_path) == stored(tmp_path, "labels") == ["a", "b"]


def test_nothing_goes_that_a_reader_has_not_passed(tmp_path: Path) -> None:
    write(tmp_path, ["a"], ["b"])
    keep_from(tmp_path, "monitor", {})
    done = compact(tmp_path)
    assert done is not None
    assert (done.files_removed, stored(tmp_path)) == (0, ["a", "b"])
    assert sorted(read_predictions(tmp_path)["id"].to_pylist()) == ["a", "b"]
    news = read_news(tmp_path, {})
    assert news is not None
    assert sorted(news.predictions["id"].to_pylist()) == ["a", "b"]
    keep_from(tmp_path, "monitor", news.positions)
    done = compact(tmp_path)
    assert done is not None
    assert (done.files_removed, files(tmp_path)) == (1, 0)
    assert stored(tmp_path) == ["a", "b"]


def test_days_older_than_kept_go(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    now, keep = datetime.now(UTC), timedelta(days=30)
    for later, left in ((timedelta(days=29), ["a"]), (timedelta(days=32), [])):
        assert compact(tmp_path, keep, now + later) is not None
        assert stored(tmp_path) == stored(tmp_path, "labels") == left
    assert read_predictions(tmp_path).num_rows == read_labels(tmp_path).num_rows == 0


def test_sampled_out_rows_reach_no_table(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"], sample=0.0)
    assert compact(tmp_path) is not None
    assert (stored(tmp_path), stored(tmp_path, "labels")) == ([], ["a", "b"])
    assert files(tmp_path) == 0


def test_inputs_and_features_may_change(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    assert compact(tmp_path) is not None

    async def later() -> None:
        inputs = {**INPUTS, "shop": RequestField(dtype="string")}
        log = PredictionLog(tmp_path, "new", inputs, Settings())
        changed = answered(["b"])
        changed.inputs["shop"] = np.array(["seven"], object)
        changed.columns["height"] = np.array([1.5])
        del changed.columns["kind"]
        model = replace(changed.parts[0].model, features=("amount",))
        changed.parts = [changed.parts[0]._replace(model=model)]
        log.add(changed)
        await log.close()

    asyncio.run(later())
    assert compact(tmp_path) is not None
    first, second = read_predictions(tmp_path).to_pylist()
    assert first["features"] == {"amount": 0.0, "kind": "a", "height": None}
    assert second["features"] == {"amount": 0.0, "kind": None, "height": 1.5}
    assert (first["inputs"]["shop"], first["inputs"]["shop__string"]) == (0, None)
    assert (second["inputs"]["shop"], second["inputs"]["shop__string"]) == (None, "seven")


def test_small_files_of_past_days_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write(tmp_path, [name])
        assert compact(tmp_path) is not None
    assert optimize(tmp_path) == 0

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(compaction, "datetime", Tomorrow)
    assert optimize(tmp_path) == 6
    assert len(DeltaTable(tmp_path / "tables/predictions").file_uris()) == 1
    assert stored(tmp_path) == ["a", "b", "c"]
    write(tmp_path, ["d"])
    assert compact(tmp_path) is not None
    assert stored(tmp_path) == ["a", "b", "c", "d"]


def test_what_a_table_remembers_of_replicas_does_not_grow_for_ever(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path, [f"a{number}"], replica=f"r{number}")
        assert compact(tmp_path) is not None
        for replica in segments(tmp_path):
            shutil.rmtree(replica_folder(tmp_path, replica))
    for kind in KINDS:
        table = open_table(tmp_path, kind)
        assert [name.partition("-")[0] for name in read_positions(tmp_path, kind, table)] == ["r4"]
        table.create_checkpoint()
        log = table_folder(tmp_path, kind) / "_delta_log"
        checkpoint = polars.read_parquet(next(log.glob("*.checkpoint.parquet")))
        assert checkpoint["txn"].drop_nulls().len() == 1
        written = sorted((tmp_path / "tables/positions").glob(f"{kind}-*"))
        assert len(written) == 5
        for path in written:
            os.utime(path, (0, 0))
        remove_old_positions(tmp_path, kind, table)
        assert sorted((tmp_path / "tables/positions").glob(f"{kind}-*")) == written[-1:]
    assert stored(tmp_path) == [f"a{number}" for number in range(5)]


def test_lost_positions_are_an_error_and_no_second_count(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    keep_from(tmp_path, "monitor", {})
    assert compact(tmp_path) is not None
    shutil.rmtree(tmp_path / "tables/positions")
    with pytest.raises(ServingError, match="not known up to where"):
        compact(tmp_path)
    with pytest.raises(ServingError, match="not known up to where"):
        read_predictions(tmp_path)
