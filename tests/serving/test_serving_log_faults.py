"""The prediction log under bad luck: disks, shadows, ends and types, and what is then promised."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from serving.log_samples import (
    ALONE,
    CHAMPION,
    REFERENCE,
    Fixed,
    answered,
    model,
    model_set,
    open_log,
)

from mlops_ray.errors import ServingError
from mlops_ray.metadata.prediction_log.layout import REDACTED
from mlops_ray.metadata.prediction_log.news import read_news
from mlops_ray.metadata.prediction_log.reading import read_predictions, scan_predictions
from mlops_ray.serving.log import prediction_log, shadows
from mlops_ray.serving.log.compaction import compact

DAY_US = 86_400_000_000


def fail(*arguments: Any) -> None:
    raise OSError(28, "no space left on device")


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def write(folder: Path, *items: Any, replica: str = "r", **settings: Any) -> None:
    """Add to the log of a replica that then ends."""

    async def go() -> None:
        log = open_log(folder, replica, **settings)
        for item in items:
            log.add(item)
        await log.close()

    asyncio.run(go())


def test_an_answer_is_on_disk_only_if_its_own_write_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """The write that takes a row along fails before whoever added it asks."""

    async def go() -> None:
        log = open_log(tmp_path, durability="answered", every="10ms")
        log.start()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            first, second = log.add(answered(["a"])), log.add(answered(["b"]))
            with pytest.raises(ServingError, match="no space"):
                await log.written(first)
        with pytest.raises(ServingError, match="no space"):
            await log.written(second)
        await log.close()

    asyncio.run(go())
    assert read_predictions(tmp_path)["id"].to_pylist() == []


def test_an_answer_that_cannot_be_logged_is_not_said_to_be_on_disk(
    tmp_path: Path, quiet: None
) -> None:
    async def go() -> None:
        log = open_log(tmp_path, durability="answered")
        log.start()
        poison = answered(["p"])
        poison.columns["kind"] = np.array([object()], object)
        bad, good = log.add(poison), log.add(answered(["a"]))
        with pytest.raises(ServingError, match="cannot be encoded"):
            await log.written(bad)
        await log.written(good)
        assert (log.pending_rows, log.dropped_rows) == (0, 1)
        await log.close()

    asyncio.run(go())
    assert read_predictions(tmp_path)["id"].to_pylist() == ["a"]


class Held(Fixed):
    """A shadow that does not come to its end before it may."""

    def __init__(self) -> None:
        super().__init__(0.25)
        self.may_end = threading.Event()
        self.calls = 0

    def predict(self, columns: Any) -> Any:
        self.calls += 1
        self.may_end.wait()
        return super().predict(columns)


def test_a_shadow_that_hangs_holds_up_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    monkeypatch.setattr(shadows, "_REST_S", 0.0)
    held = Held()
    models = model_set(CHAMPION, [model("held", 2, held), model("good", 3, Fixed(0.75))])

    async def go() -> None:
        log = open_log(tmp_path, durability="answered")
        log.start()
        for name in "abc":
            await log.written(log.add(answered([name], models)))
        assert held.calls == 1
        held.may_end.set()
        while True:
            await log.written(log.add(answered(["later"], models)))
            if held.calls > 1:
                break
        await log.close()

    try:
        asyncio.run(asyncio.wait_for(go(), 60))
    finally:
        held.may_end.set()
    rows = read_predictions(tmp_path).to_pylist()
    assert [row["shadow_held"] for row in rows[:3]] == [None] * 3
    found = pa.concat_tables(scan_predictions(tmp_path), promote_options="permissive")
    assert found["shadow_held"].to_pylist()[-1] == 0.25
    assert {row["shadow_good"] for row in rows[1:]} == {0.75}


@pytest.mark.parametrize("turns", range(8))
def test_closing_at_any_moment_keeps_what_was_added(tmp_path: Path, turns: int) -> None:
    async def go() -> None:
        log = open_log(tmp_path, durability="answered")
        log.start()
        await asyncio.sleep(0)
        waiting = asyncio.create_task(log.written(log.add(answered(["a"]))))
        for _ in range(turns):
            await asyncio.sleep(0)
        await log.close()
        await asyncio.wait_for(waiting, 30)
        assert log.pending_rows == 0
        with pytest.raises(ServingError, match="closed"):
            log.add(answered(["b"]))

    asyncio.run(go())
    assert read_predictions(tmp_path)["id"].to_pylist() == ["a"]


def test_a_write_ends_also_where_who_asked_for_it_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    real = os.fdatasync

    def slow(file: int) -> None:
        may_write.wait(30)
        real(file)

    monkeypatch.setattr(os, "fdatasync", slow)

    async def go() -> None:
        log = open_log(tmp_path, durability="answered")
        added = log.add(answered(["a", "b"]))
        flush = asyncio.create_task(log.flush())
        waiting = asyncio.create_task(log.written(added))
        await asyncio.sleep(0.05)
        flush.cancel()
        may_write.set()
        await asyncio.wait_for(waiting, 30)
        assert log.pending_rows == 0
        await log.close()

    asyncio.run(go())
    assert read_predictions(tmp_path)["id"].to_pylist() == ["a", "b"]


def test_memory_is_bounded_in_bytes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    monkeypatch.setattr(prediction_log, "MAX_PENDING_BYTES", 2_000_000)

    def long(name: str) -> Any:
        item = answered([name])
        item.inputs["customer"] = np.array(["x" * 900_000], object)
        return item

    async def go() -> None:
        log = open_log(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            for number in range(5):
                log.add(long(str(number)))
                with pytest.raises(OSError, match="no space"):
                    await log.flush()
        assert (log.pending_rows, log.dropped_rows) == (3, 2)
        poison = long("poison")
        poison.columns["kind"] = np.array([object()], object)
        await log.flush()
        for _ in range(4):
            log.add(poison)
            await log.flush()
        log.add(long("5"))
        await log.close()
        assert log.dropped_rows == 6

    asyncio.run(go())
    assert read_predictions(tmp_path)["id"].to_pylist() == ["0", "1", "2", "5"]


def test_days_that_clients_choose_are_counted_as_one_beyond_a_number(tmp_path: Path) -> None:
    write(
        tmp_path,
        answered([f"t{i}" for i in range(40)]),
        answered([f"o{i}" for i in range(500)], times_us=[i * DAY_US for i in range(1, 501)]),
    )
    news = read_news(tmp_path, {})
    assert news is not None
    days = news.buckets[REFERENCE.digest]
    assert len(days) == 65
    assert days["2024-03-01"].rows == 40
    assert days["0001-01-01"].rows == 500 - 63
    assert sum(profile.rows for profile in days.values()) == 540


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "redaction.key").write_bytes(b"")
    with pytest.raises(ServingError, match="damaged"):
        open_log(tmp_path, redact=["customer"])


def test_types_that_differ_fit_into_one_log(tmp_path: Path) -> None:
    """A replica redacts or has an input of another type before all was compacted."""

    for replica, redacted in (("a", []), ("b", ["shop"]), ("c", [])):
        write(tmp_path, answered([replica]), replica=replica, redact=redacted)
    for _ in range(2):
        rows = read_predictions(tmp_path)
        assert sorted(rows["id"].to_pylist()) == ["a", "b", "c"]
        inputs = {row["id"]: row["inputs"] for row in rows.to_pylist()}
        assert (inputs["a"]["shop"], inputs["b"]["shop"], inputs["c"]["shop"]) == (0, None, 0)
        assert inputs["b"]["shop__string"].startswith(REDACTED)
        assert compact(tmp_path) is not None


def test_columns_that_nobody_logged_are_null(tmp_path: Path) -> None:
    wanted = ["id", "score", "shadow_new", "features"]
    empty = read_predictions(tmp_path, columns=wanted)
    assert (empty.num_rows, empty.column_names) == (0, wanted)
    for name, models in (("a", ALONE), ("b", model_set(CHAMPION, [model("new", 2, Fixed(0.1))]))):
        write(tmp_path, answered([name], models), replica=name)
        for _ in range(2):
            found = read_predictions(tmp_path, columns=wanted)
            assert found.column_names == wanted
            shadow = {row["id"]: row["shadow_new"] for row in found.to_pylist()}
            assert shadow == ({"a": None} if name == "a" else {"a": None, "b": 0.1})
            assert found["features"].null_count == 0
            tables = scan_predictions(tmp_path, columns=["shadow_never"])
            only = pa.concat_tables(tables)["shadow_never"]
            assert (len(only), only.null_count) == (len(shadow), len(shadow))
            assert compact(tmp_path) is not None
