"""The prediction log of a replica: what is kept, when it is on disk, and what the monitor hears."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.log_samples import (
    ALONE,
    AT_US,
    CHAMPION,
    INPUTS,
    REFERENCE,
    Broken,
    Fixed,
    answered,
    model,
    model_set,
    open_log,
)

from mlops_ray.config.serving import PredictionLog as Settings
from mlops_ray.errors import ServingError
from mlops_ray.metadata.prediction_log.layout import REDACTED, segments
from mlops_ray.metadata.prediction_log.news import keep_from, read_news, wanted_from
from mlops_ray.metadata.prediction_log.reading import (
    read_labels,
    read_predictions,
    scan_predictions,
)
from mlops_ray.metadata.profile import merge
from mlops_ray.serving.endpoint.grouping import Group, answered_by
from mlops_ray.serving.formats.feedback import Feedback
from mlops_ray.serving.log import prediction_log
from mlops_ray.serving.log.pieces import publish_piece, write_piece
from mlops_ray.serving.log.redaction import Redaction, chosen, project_key

DAY_US = 86_400_000_000
NO_SPACE = OSError(28, "no space left on device")


def asynchronous(test: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    def body(tmp_path: Path) -> None:
        asyncio.run(test(tmp_path))  # type: ignore[arg-type]

    body.__name__, body.__doc__ = test.__name__, test.__doc__
    return body


@pytest.fixture
def quiet() -> Any:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@asynchronous
async def test_a_row_says_who_answered_what_when_and_why(tmp_path: Path) -> None:
    challenger, second = model("challenger", 2, Fixed(0.75)), model("second", 3, Fixed(0.25))
    models = model_set(CHAMPION, [second], [challenger])
    log = open_log(tmp_path)
    log.add(answered(["a", "b"], models, latency_us=310))
    log.add(answered(["c"], models, challenger))
    assert log.pending_rows == 3
    assert await log.flush() == 3
    assert (await log.flush(), log.pending_rows) == (0, 0)
    rows = read_predictions(tmp_path).to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["route"] for row in rows] == ["champion", "champion", "challenger"]
    assert [row["version"] for row in rows] == [1, 1, 2]
    assert [row["score"] for row in rows] == [0.5, 0.5, 0.75]
    assert [row["shadow_second"] for row in rows] == [0.25] * 3
    assert [row["latency_us"] for row in rows] == [310, 310, 250]
    assert rows[1]["features"] == {"amount": 1.0, "kind": "b"}
    assert rows[1]["inputs"]["customer"] == "customer 1"
    assert rows[1]["inputs"]["at"] == rows[1]["time"]
    assert rows[0]["received"] >= rows[0]["time"]
    await log.close()


@asynchronous
async def test_rows_of_a_batch_belong_to_who_answered_them(tmp_path: Path) -> None:
    """Batches of two models each, one of them with the models of another name."""
    challenger = model("challenger", 2, Fixed(0.75))
    models = model_set(CHAMPION, (), [challenger])
    others = replace(model_set(model("champion", 7, Fixed(0.1))), name="other")
    batches = [["a", "b", "c"], ["d", "e", "f", "g"]]
    log = open_log(tmp_path)
    for ids in batches:
        first, second, other = (np.arange(len(ids))[place::3] for place in range(3))
        whole = answered(ids, models, latency_us=100 * len(ids))
        mine = [Group(models, CHAMPION, first), Group(models, challenger, second)]
        for groups in (mine, [Group(others, others.answer, other)]):
            log.add(answered_by(whole, groups))
    assert log.pending_rows == 7
    assert await log.flush() == 7
    assert log.describe() == {"pending_rows": 0, "dropped_rows": 0, "failing": None}
    rows = {row["id"]: row for row in read_predictions(tmp_path).to_pylist()}
    assert sorted(rows) == list("abcdefg")
    for ids in batches:
        for place, identifier in enumerate(ids):
            row, who = rows[identifier], place % 3
            assert row["version"] == (1, 2, 7)[who]
            assert row["route"] == ("champion", "challenger", "champion")[who]
            assert row["model"] == (None, None, "other")[who]
            assert row["features"]["amount"] == place
            assert row["inputs"]["customer"] == f"customer {place}"
            assert row["latency_us"] == 100 * len(ids)
    await log.close()


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [2], [3, 0]])
def test_the_log_holds_on_to_nothing_but_what_it_keeps(kept: list[int]) -> None:
    whole = answered(["a", "b", "c", "d"])
    rows = np.array(kept)
    found = answered_by(whole, [Group(ALONE, CHAMPION, rows)])
    assert found.rows == len(found.ids) == len(kept)
    (part,) = found.parts
    assert [found.ids[place] for place in part.rows] == ["abcd"[row] for row in kept]
    for columns in (found.columns, found.inputs):
        assert {len(values) for values in columns.values()} == {len(kept)}
    assert found.columns["amount"][part.rows].tolist() == kept


@asynchronous
async def test_a_shadow_that_fails_costs_no_row(tmp_path: Path) -> None:
    logging.disable(logging.CRITICAL)
    same = model("same", 1, CHAMPION.scorer)
    log = open_log(tmp_path)
    log.add(answered(["a"], model_set(CHAMPION, [model("broken", 2, Broken()), same])))
    await log.close()
    logging.disable(logging.NOTSET)
    (row,) = read_predictions(tmp_path).to_pylist()
    assert (row["shadow_broken"], row["shadow_same"]) == (None, 0.5)


@asynchronous
async def test_what_cannot_be_logged_keeps_nothing_else_from_it(tmp_path: Path) -> None:
    logging.disable(logging.CRITICAL)
    log = open_log(tmp_path)
    poison = answered(["p"])
    poison.columns["kind"] = np.array([object()], object)
    for item in (answered(["a"]), poison, answered(["b", "c"])):
        log.add(item)
    assert await log.flush() == 3
    logging.disable(logging.NOTSET)
    assert (log.pending_rows, log.dropped_rows) == (0, 1)
    assert read_predictions(tmp_path)["id"].to_pylist() == ["a", "b", "c"]
    await log.close()


@asynchronous
async def test_the_monitor_hears_of_every_row_once(tmp_path: Path) -> None:
    one, two = open_log(tmp_path, "one", sample=0.3), open_log(tmp_path, "two", redact=["kind"])
    challenger = model("challenger", 2, Fixed(0.75))
    ids = [f"id {number}" for number in range(60)]
    one.add(answered(ids[:40], times_us=[AT_US] * 30 + [AT_US + DAY_US] * 10))
    two.add(answered(ids[40:], model_set(CHAMPION, (), [challenger]), challenger))
    two.add_labels(Feedback(["id 3"], [1], [AT_US]))
    await one.flush()
    await two.flush()
    news = read_news(tmp_path, {})
    assert news is not None
    assert sorted(news.predictions["id"].to_pylist()) == sorted(ids)
    assert news.predictions["version"].to_pylist().count(2) == 20
    assert news.labels.to_pylist()[0]["id"] == "id 3"
    days = news.buckets[REFERENCE.digest]
    assert {day: profile.rows for day, profile in days.items()} == {
        "2024-03-01": 50,
        "2024-03-02": 10,
    }
    amounts = np.array([*range(40), *range(20)], np.float64)
    kinds = np.array([("a", "b", None)[int(amount) % 3] for amount in amounts], object)
    assert merge(days.values()) == REFERENCE.bin({"amount": amounts, "kind": kinds})
    assert read_news(tmp_path, news.positions) is None
    one.add(answered(["later"]))
    await one.close()
    await two.close()
    later = read_news(tmp_path, news.positions)
    assert later is not None
    assert later.predictions["id"].to_pylist() == ["later"]
    assert later.positions.keys() == {name for name in news.positions if name.startswith("one")}


def test_long_news_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlops_ray.metadata.prediction_log.news._MOST_FRAMES", 4)

    async def fill() -> None:
        for replica in "ab":
            log = open_log(tmp_path, replica)
            for number in range(7):
                log.add(answered([f"{replica}{number}"]))
                await log.flush()
            await log.close()

    asyncio.run(fill())
    positions: dict[str, int] = {}
    heard = []
    while (news := read_news(tmp_path, positions)) is not None:
        assert 1 <= news.predictions.num_rows <= 4
        heard += news.predictions["id"].to_pylist()
        positions |= news.positions
    assert sorted(heard) == sorted(f"{replica}{number}" for replica in "ab" for number in range(7))


def test_readers_that_are_gone_for_long_are_forgotten(tmp_path: Path) -> None:
    keep_from(tmp_path, "monitor", {"r": 3})
    keep_from(tmp_path, "other", {})
    assert wanted_from(tmp_path) == [{"r": 3}, {}]
    os.utime(tmp_path / "readers" / "other.json", (0, 0))
    assert wanted_from(tmp_path) == [{"r": 3}]


@asynchronous
async def test_sampling_keeps_whole_rows_and_says_the_share(tmp_path: Path) -> None:
    ids = [f"id {number}" for number in range(400)]
    log = open_log(tmp_path, sample=0.25)
    log.add(answered(ids))
    await log.close()
    rows = read_predictions(tmp_path).to_pylist()
    kept = chosen(ids, 0.25)
    assert [row["id"] for row in rows] == [i for i, keep in zip(ids, kept, strict=True) if keep]
    assert {row["sample"] for row in rows} == {0.25}
    assert all(row["features"]["amount"] == int(row["id"][3:]) for row in rows)
    (segment,) = next(iter(segments(tmp_path).values()))
    left_out = next(i for i, keep in enumerate(kept) if not keep)
    assert f"customer {left_out}".encode() not in segment.path.read_bytes()


def test_a_sample_is_unbiased_and_grows_with_the_share() -> None:
    ids = [f"0c9a-{number}" for number in range(20_000)]
    tenth, half = chosen(ids, 0.1), chosen(ids, 0.5)
    # Five standard deviations of a binomial count.
    assert abs(tenth.sum() - 2000) < 5 * np.sqrt(20_000 * 0.1 * 0.9)
    assert abs(half.sum() - 10_000) < 5 * np.sqrt(20_000 * 0.25)
    assert half[tenth].all()
    assert chosen(ids, 1.0).all()
    assert not chosen(ids, 0.0).any()


@asynchronous
async def test_redacted_values_are_in_no_file(tmp_path: Path) -> None:
    for replica in "ab":
        log = open_log(tmp_path, replica, redact=["customer", "shop", "kind"])
        log.add(answered([f"{replica}0", f"{replica}1", f"{replica}2"]))
        await log.close()
    rows = read_predictions(tmp_path).to_pylist()
    by_id = {row["id"]: row for row in rows}
    for row in rows:
        assert row["inputs"]["customer"].startswith(REDACTED)
        assert row["inputs"]["shop"].startswith(REDACTED)
    assert by_id["a1"]["inputs"] == by_id["b1"]["inputs"]
    assert by_id["a1"]["inputs"]["shop"] != by_id["a2"]["inputs"]["shop"]
    assert by_id["a2"]["features"]["kind"] is None
    assert by_id["a1"]["features"]["amount"] == 1.0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert not any(b"customer 1" in path.read_bytes() for path in files)
    mode = stat.S_IMODE((tmp_path / "redaction.key").stat().st_mode)
    assert mode == 0o600


def test_the_key_is_made_once_by_whoever_is_first(tmp_path: Path) -> None:
    keys: list[bytes] = []
    threads = [threading.Thread(target=lambda: keys.append(project_key(tmp_path))) for _ in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32
    other = Redaction(["x"], bytes(32)).column("x", np.array(["v"], object))
    assert other != Redaction(["x"], keys[0]).column("x", np.array(["v"], object))


@asynchronous
async def test_answers_that_wait_are_on_disk_and_share_a_write(tmp_path: Path) -> None:
    log = open_log(tmp_path, durability="answered", every="1h")
    log.start()

    async def answer(number: int) -> list[str]:
        await log.written(log.add(answered([str(number)])))
        return read_predictions(tmp_path)["id"].to_pylist()

    seen = await asyncio.wait_for(asyncio.gather(*(answer(n) for n in range(50))), 30)
    assert all(str(number) in found for number, found in enumerate(seen))
    found = read_news(tmp_path, {})
    assert found is not None
    assert max(found.positions.values()) <= 3
    waiting = asyncio.create_task(answer(50))
    other = asyncio.create_task(answer(51))
    await asyncio.sleep(0)
    waiting.cancel()
    assert "51" in await asyncio.wait_for(other, 30)
    await log.close()


def test_a_full_disk_is_said_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    async def go() -> None:
        log = open_log(tmp_path)
        log.add(answered(["a"]))
        await log.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            for name in ("b", "c"):
                log.add(answered([name]))
                with pytest.raises(OSError, match="no space"):
                    await log.flush()
            assert log.describe() == {
                "pending_rows": 2,
                "dropped_rows": 0,
                "failing": str(NO_SPACE),
            }
        log.add_labels(Feedback(["a"], [1], [AT_US]))
        assert await log.flush() == 3
        assert log.describe() == {"pending_rows": 0, "dropped_rows": 0, "failing": None}
        await log.close()

    asyncio.run(go())
    assert read_predictions(tmp_path)["id"].to_pylist() == ["a", "b", "c"]
    assert read_labels(tmp_path)["id"].to_pylist() == ["a"]


def test_a_full_disk_refuses_answers_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    async def go() -> None:
        log = open_log(tmp_path, durability="answered", every="10ms")
        log.start()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            for _ in range(2):
                added = log.add(answered(["refused"]))
                with pytest.raises(ServingError, match="no space"):
                    await log.written(added)
            assert log.describe()["pending_rows"] == 0
        await log.written(log.add(answered(["taken"])))
        assert log.describe()["failing"] is None
        await log.close()

    asyncio.run(go())
    assert read_predictions(tmp_path)["id"].to_pylist() == ["taken"]


def test_memory_is_bounded_while_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    assert prediction_log.MAX_PENDING_ROWS >= 100_000
    monkeypatch.setattr(prediction_log, "MAX_PENDING_ROWS", 3)
    (tmp_path / "replicas").write_text("no folder")

    async def go() -> None:
        log = open_log(tmp_path)
        for number in range(5):
            log.add(answered([str(number)]))
            with pytest.raises(OSError, match="replicas"):
                await log.flush()
        assert (log.pending_rows, log.dropped_rows) == (3, 2)
        with pytest.raises(ServingError, match="3 rows wait"):
            log.add_labels(Feedback(["x", "y"], [1, 0], [AT_US, AT_US]))
        assert log.dropped_rows == 2
        (tmp_path / "replicas").unlink()
        assert await log.flush() == 3
        await log.close()
        waiting = open_log(tmp_path, durability="answered")
        waiting.add(answered(list("wxyz")))
        with pytest.raises(ServingError, match="4 rows wait"):
            waiting.add(answered(["more"]))

    asyncio.run(go())
    assert read_predictions(tmp_path)["id"].to_pylist() == ["0", "1", "2"]


@asynchronous
async def test_started_it_writes_by_itself(tmp_path: Path) -> None:
    log = open_log(tmp_path, every="10ms", compact_every="50ms")
    log.start()
    log.add(answered(["a"]))
    async with asyncio.timeout(30):
        while log.pending_rows:
            await asyncio.sleep(0.01)
        while not (tmp_path / "tables" / "predictions" / "_delta_log").exists():
            await asyncio.sleep(0.01)
    await log.close()
    assert read_predictions(tmp_path)["id"].to_pylist() == ["a"]


@settings(deadline=None, max_examples=25)
@given(
    told=st.lists(
        st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 1)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_of_the_labels_of_an_id_the_last_one_counts(
    tmp_path_factory: pytest.TempPathFactory, told: list[list[tuple[str, int]]]
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    expected: dict[str, int] = {}

    async def go() -> None:
        log = open_log(folder)
        for group in told:
            ids, labels = [i for i, _ in group], [label for _, label in group]
            log.add_labels(Feedback(ids, labels, [AT_US] * len(ids)))
            # Of what comes together, and was known at the same time, the larger label counts.
            expected.update(sorted(group, key=lambda item: item[1]))
            await log.flush()
        await log.close()

    asyncio.run(go())
    found = read_labels(folder)
    assert dict(zip(found["id"].to_pylist(), found["label"].to_pylist(), strict=True)) == expected
    assert len(found) == len(expected)
    assert read_labels(folder, ids=["b"])["label"].to_pylist() == [
        label for name, label in expected.items() if name == "b"
    ]


def test_pieces_of_a_batch_are_in_the_log_and_no_news(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    path = tmp_path / "piece"
    for piece in (2, 1):
        rows = [answered([f"{piece}-{number}"], ALONE) for number in range(3)]
        write_piece(path, rows, folder, INPUTS, Settings())
        assert piece == 2 or len(read_predictions(folder)) == 3
        publish_piece(path, folder, "job", piece)
        publish_piece(path, folder, "job", piece)
    ids = read_predictions(folder)["id"].to_pylist()
    assert sorted(ids) == ["1-0", "1-1", "1-2", "2-0", "2-1", "2-2"]
    assert read_news(folder, {}) is None


@asynchronous
async def test_reading_by_time_version_and_id(tmp_path: Path) -> None:
    from datetime import UTC, datetime, timedelta

    log = open_log(tmp_path)
    assert read_predictions(tmp_path).num_rows == read_labels(tmp_path).num_rows == 0
    begin = datetime.now(UTC)
    second = model_set(model("champion", 2, Fixed(0.1)))
    log.add(answered(["a", "b"], times_us=[AT_US, AT_US + DAY_US]))
    log.add(answered(["c"], second))
    log.add(answered(["a"], second))
    await log.close()
    at = datetime(2024, 3, 1, 13, tzinfo=UTC)

    def ids(**conditions: Any) -> list[str]:
        found: list[str] = read_predictions(tmp_path, **conditions)["id"].to_pylist()
        return found

    assert ids() == ["a", "b", "c"]
    assert read_predictions(tmp_path, ids=["a"])["version"].to_pylist() == [1]
    assert ids(since=at) == ["b"]
    assert ids(until=at) == ["a", "c"]
    assert ids(versions=[2]) == ["c", "a"]
    assert ids(received_since=begin, received_until=datetime.now(UTC)) == ["a", "b", "c"]
    assert ids(received_until=begin - timedelta(days=1)) == []
    assert read_predictions(tmp_path, columns=["score"]).column_names == ["score"]
    assert sum(table.num_rows for table in scan_predictions(tmp_path)) == 4


def fail(*arguments: Any) -> None:
    raise NO_SPACE
