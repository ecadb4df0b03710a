"""Pushed events: online at once, nothing lost, and the bits of a backfill of the same log."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError, RequestError
from mlops_ray.features.columns import from_us
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.pushed import PushedFeatures
from mlops_ray.features.sources import clean_table, cleaning, open_source
from mlops_ray.metadata.home import Home

MINUTE_US = 60_000_000
START_US = 1_700_000_000_000_000 // MINUTE_US * MINUTE_US
VIEWS = ("newest", "paid", "paid_again")


def declare(**changes: Any) -> Features:
    return Features.model_validate(
        {
            "sources": {
                "payments": {
                    "push": {"shop": "string", "till": "int", "amount": "float", "at": "timestamp"},
                },
            },
            "entities": {
                "shop": {"keys": {"shop": "string"}},
                "till": {"keys": {"shop": "string", "till": "int"}},
            },
            "views": {
                "newest": {
                    "entity": "till",
                    "source": "payments",
                    "event_time": "at",
                    "columns": {"amount": "float"},
                },
                "paid": {
                    "entity": "shop",
                    "source": "payments",
                    "event_time": "at",
                    "every": "1m",
                    "windows": ["2m", "5m"],
                    "aggregates": {
                        "number": {"by": "count"},
                        "total": {"by": "sum", "of": "amount"},
                        "last": {"by": "last", "of": "amount"},
                        "tills": {"by": "approx_distinct", "of": "till"},
                    },
                },
                "paid_again": {
                    "entity": "shop",
                    "view": "paid",
                    "columns": {"total_5m": "float", "number_2m": "int"},
                },
            },
            "services": {},
            "labels": dict.fromkeys(("source", "id", "time", "label", "known_at"), "payments"),
        }
        | changes
    )


class Till:
    """A place that takes in events, on a clock that the test moves."""

    def __init__(self, root: Path, features: Features | None = None) -> None:
        self.root = root
        self.features = features or declare()
        self.now_us = START_US
        self.offline = OfflineStore(root / "offline", self.features)
        self.online = open_online(self.features, root / "online", "shop")
        self.pushed = self.open()

    def open(self) -> PushedFeatures:
        return PushedFeatures(
            self.features,
            self.root / "events",
            self.offline,
            self.online,
            commit_rows=7,
            now_us=lambda: self.now_us,
        )

    def crash(self) -> None:
        for log in self.pushed._logs.values():
            log._lock.close()
        self.pushed = self.open()

    def backfilled(self, root: Path, until_us: int) -> OfflineStore:
        """Make the same rows from the log, all at once."""
        source = self.features.sources["payments"]
        events = open_source(source, self.root / "events" / "payments").read_all()
        table = clean_table(source, events).read_all()
        offline = OfflineStore(root / "offline", self.features)
        online = open_online(self.features, root / "online", "shop")
        pipeline = FeaturePipeline(self.features, {"payments": table}, offline, online, live=True)
        pipeline.advance(from_us(until_us))
        return offline


def bits(offline: OfflineStore, view: str) -> list[tuple[Any, ...]]:
    table = offline.read(view)
    columns = []
    for field, values in zip(table.schema, table.columns, strict=True):
        if pa.types.is_floating(field.type):
            values = pa.chunked_array(
                [np.asarray(v.fill_null(-1.0)).view(np.int64) for v in values.chunks], pa.int64()
            )
        columns.append(values.to_pylist())
    return sorted(zip(*columns, strict=True), key=str)


payment = st.tuples(
    st.sampled_from(["north", "süd", None]),
    st.integers(1, 2),
    st.one_of(st.none(), st.floats(-100, 100), st.sampled_from([0.1, 1e16, -1e16])),
    st.integers(-400, 30),
)
happening = st.one_of(
    st.tuples(st.just("push"), st.lists(payment, min_size=1, max_size=4)),
    st.tuples(st.just("push"), st.lists(payment, min_size=1, max_size=4)),
    st.tuples(st.sampled_from(["tick", "commit", "crash"]), st.none()),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(happening, st.integers(0, 150)), max_size=14))
def test_online_and_offline_are_a_backfill_of_the_log(
    tmp_path_factory: pytest.TempPathFactory, story: list
) -> None:
    till = Till(tmp_path_factory.mktemp("till"))
    sent = 0
    for (what, rows), passed_s in story:
        till.now_us += passed_s * 1_000_000
        if what == "push":
            names = ("shop", "till", "amount")
            events = [
                dict(zip(names, row, strict=False))
                | {"at": from_us(till.now_us + row[3] * 1_000_000)}
                for row in rows
            ]
            assert till.pushed.push("payments", events) == len(rows)
            sent += len(rows)
        elif what == "tick":
            till.pushed.tick()
        elif what == "commit":
            till.pushed.commit()
        else:
            till.crash()
    till.now_us += 10 * MINUTE_US
    till.pushed.tick()
    until_us = till.pushed._last_us
    expected = till.backfilled(tmp_path_factory.mktemp("again"), until_us)
    compare_online(till, expected, until_us)
    till.pushed.commit()
    for view in VIEWS:
        assert bits(till.offline, view) == bits(expected, view)
    log = open_source(till.features.sources["payments"], till.root / "events" / "payments")
    received = log.read_all()["received_at"].cast(pa.int64()).to_numpy()
    assert len(received) == sent
    assert (np.diff(received) >= 0).all()


def compare_online(till: Till, expected: OfflineStore, now_us: int) -> None:
    """What is seen online is the newest row of each entity of the backfill."""
    for view in VIEWS:
        rows = expected.read(view).sort_by(
            [("event_time", "ascending"), ("created_time", "ascending")]
        )
        newest: dict[tuple[Any, ...], dict[str, Any]] = {}
        keys = [name for name in ("shop", "till") if name in rows.column_names]
        for row in rows.to_pylist():
            newest[tuple(row[name] for name in keys)] = row
        for key, row in newest.items():
            arrays = [
                np.array([part], object if isinstance(part, str) else np.int64) for part in key
            ]
            matrix, status = till.online.read_matrix(view, arrays, np.array([now_us]))
            features = [row[name] for name in till.features.views[view].feature_names]
            assert (status[0] == 0).tolist() == [value is not None for value in features]
            np.testing.assert_array_equal(
                matrix[0], [np.nan if value is None else float(value) for value in features]
            )


def test_an_event_is_online_when_push_returns(tmp_path: Path) -> None:
    till = Till(tmp_path)
    event = {"shop": "north", "till": 1, "amount": 3.5, "at": from_us(START_US)}
    assert till.pushed.push("payments", [event]) == 1
    key = [np.array(["north"], object), np.array([1])]
    now = np.array([till.pushed._last_us])
    assert till.online.read_matrix("newest", key, now)[0][0, 0] == 3.5
    assert till.offline.version("newest") == -1
    later = {
        "payments": [
            pa.table({"shop": ["north"], "till": [1], "amount": [4.5], "at": [from_us(START_US)]})
        ]
    }
    till.pushed.push("payments", later["payments"][0])
    now = np.array([till.pushed._last_us])
    assert till.online.read_matrix("newest", key, now)[0][0, 0] == 4.5


def test_commits_come_by_rows_and_by_time(tmp_path: Path) -> None:
    till = Till(tmp_path)
    event = {"shop": "north", "till": 1, "amount": 1.0, "at": from_us(START_US)}
    till.pushed.push("payments", [event] * 6)
    assert till.pushed.status()["uncommitted"] == 6
    till.pushed.push("payments", [event])
    assert till.pushed.status()["uncommitted"] == 0
    assert till.offline.version("newest") == 0
    till.pushed.push("payments", [event])
    till.pushed._commit_every_s = 0.0
    till.pushed.tick()
    assert till.offline.version("newest") == 1


def test_refused_events_leave_no_trace(tmp_path: Path) -> None:
    till = Till(tmp_path)
    good = {"shop": "north", "till": 1, "amount": 1.0, "at": from_us(START_US)}
    with pytest.raises(RequestError, match="row 1, amount: must be a number") as caught:
        till.pushed.push("payments", [good, good | {"amount": "1"}])
    assert (caught.value.row, caught.value.field) == (1, "amount")
    with pytest.raises(FeatureStoreError, match="no source 'sales' that takes pushed events"):
        till.pushed.push("sales", [good])
    till.pushed.commit()
    assert till.offline.read("newest").num_rows == 0


@pytest.mark.usefixtures("shop_project")
def test_a_clean_function_may_drop_and_refuse(tmp_path: Path) -> None:
    source = {
        "push": {"shop": "string", "till": "int", "amount": "float", "at": "timestamp"},
        "clean": "shop_project.positive",
    }
    till = Till(tmp_path, declare(sources={"payments": source}))
    good = {"shop": "north", "till": 1, "amount": 1.0, "at": from_us(START_US)}
    assert till.pushed.push("payments", [good, good | {"amount": -1.0, "till": 2}]) == 2
    with pytest.raises(RequestError, match="amount 99"):
        till.pushed.push("payments", [good | {"amount": 99.0}])
    till.crash()
    till.pushed.commit()
    assert till.offline.read("newest")["till"].to_pylist() == [1]


def test_stores_that_fail_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    till = Till(tmp_path)
    event = {"shop": "north", "till": 1, "amount": 1.0, "at": from_us(START_US)}

    def gone(*_: Any) -> int:
        raise FeatureStoreError("the online store does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(till.online), "write", gone)
        assert till.pushed.push("payments", [event]) == 1
        assert "does not answer" in till.pushed.status()["error"]
        assert till.pushed.push("payments", [event | {"till": 2}]) == 1
        assert till.pushed.tick() == 0
    till.pushed.tick()
    assert till.pushed.status()["error"] == ""
    keys = [np.array(["north"] * 2, object), np.array([1, 2])]
    now = np.full(2, till.pushed._last_us)
    assert (till.online.read_matrix("newest", keys, now)[1] == 0).all()
    till.pushed.commit()
    assert sorted(till.offline.read("newest")["till"].to_pylist()) == [1, 2]


def test_many_threads_share_the_writes(tmp_path: Path) -> None:
    till = Till(tmp_path)
    appends: list[int] = []
    log = till.pushed._logs["payments"]
    append = log.append

    def counted(events: pa.Table) -> None:
        appends.append(events.num_rows)
        append(events)

    log.append = counted  # type: ignore[method-assign]
    till.pushed._storing.acquire()

    def push(number: int) -> None:
        event = {"shop": f"s{number}", "till": 1, "amount": 1.0, "at": from_us(START_US)}
        till.pushed.push("payments", [event])

    threads = [threading.Thread(target=push, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    while len(till.pushed._queue) < 20:
        pass
    till.pushed._storing.release()
    for thread in threads:
        thread.join()
    assert appends == [20]
    till.pushed.commit()
    assert till.offline.read("newest").num_rows == 20


@pytest.mark.parametrize("wrong", [OSError("no space left"), ValueError("a bug")])
def test_no_push_of_a_group_is_accepted_unless_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    till = Till(tmp_path)
    told: list[Any] = []

    def full() -> None:
        raise wrong

    def push(number: int) -> None:
        event = {"shop": f"s{number}", "till": 1, "amount": 1.0, "at": from_us(START_US)}
        try:
            told.append(till.pushed.push("payments", [event]))
        except Exception as error:
            told.append(error)

    monkeypatch.setattr(till.pushed._logs["payments"], "_open_next", full)
    with till.pushed._storing:
        threads = [threading.Thread(target=push, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        while len(till.pushed._queue) < 3:
            pass
    for thread in threads:
        thread.join()
    assert len(told) == 3
    expected = FeatureStoreError if isinstance(wrong, OSError) else ValueError
    assert all(isinstance(answer, expected) for answer in told)


def test_windows_that_time_completes_are_committed(tmp_path: Path) -> None:
    till = Till(tmp_path)
    till.pushed._commit_every_s = 0.0
    event = {"shop": "north", "till": 1, "amount": 1.0, "at": from_us(START_US)}
    till.pushed.push("payments", [event])
    till.pushed.tick()
    till.now_us += 10 * MINUTE_US
    till.pushed.tick()
    assert till.offline.read("paid").num_rows > 0


def test_events_against_an_expectation_of_rows_are_refused(tmp_path: Path) -> None:
    source = {
        "push": {"shop": "string", "till": "int", "amount": "float", "at": "timestamp"},
        "expectations": [
            {"column": "amount", "minimum": 0, "nulls": 0.1, "unique": True},
            {"column": "till", "maximum": 5, "severity": "warn"},
        ],
    }
    till = Till(tmp_path, declare(sources={"payments": source}))
    good = {"shop": "north", "till": 9, "amount": 1.0, "at": from_us(START_US)}
    assert till.pushed.push("payments", [good, good, good | {"amount": None}]) == 3
    with pytest.raises(RequestError, match="minimum should be at least 0"):
        till.pushed.push("payments", [good, good | {"amount": -1.0}])
    till.pushed.commit()
    log = open_source(till.features.sources["payments"], tmp_path / "events" / "payments")
    assert log.read_all().num_rows == 3


def test_a_restart_cleans_the_log_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "CLEAN_ROWS", 4)
    source = declare().sources["payments"].model_dump(mode="json", exclude_none=True)
    source["clean"] = "features.cleaners.four_at_most"
    till = Till(tmp_path, declare(sources={"payments": source}))
    for number in range(9):
        event = {"shop": "north", "till": number, "amount": 1.0, "at": from_us(START_US)}
        assert till.pushed.push("payments", [event]) == 1
    till.crash()
    assert till.pushed.push("payments", [event]) == 1


def test_available_at_counts_no_earlier_than_received(tmp_path: Path) -> None:
    source = {
        "push": {"shop": "string", "till": "int", "amount": "float", "at": "timestamp"},
        "available_at": "at",
    }
    till = Till(tmp_path, declare(sources={"payments": source}))
    till.pushed.tick()
    done_us = till.pushed._last_us
    event = {"shop": "north", "till": 1, "amount": 1.0, "at": from_us(START_US - 5 * MINUTE_US)}
    till.pushed.push("payments", [event])
    till.pushed.commit()
    created = till.offline.read("newest")["created_time"].cast(pa.int64()).to_pylist()
    assert len(created) == 1
    assert created[0] > done_us


def test_a_batch_pipeline_stays_behind_the_events(tmp_path: Path) -> None:
    till = Till(tmp_path)
    event = {"shop": "north", "till": 1, "amount": 1.0, "at": from_us(START_US)}
    till.pushed.push("payments", [event])
    events = open_source(till.features.sources["payments"], tmp_path / "events/payments").read_all()
    batch = FeaturePipeline(till.features, {"payments": events}, till.offline, till.online)
    batch.advance(from_us(START_US + 60 * MINUTE_US))
    till.now_us += MINUTE_US
    till.pushed.push("payments", [event | {"till": 2}])
    till.pushed.commit()
    assert sorted(till.offline.read("newest")["till"].to_pylist()) == [1, 2]


def test_the_actor_and_its_doors(ray_cluster: Any, home: Home) -> None:
    from mlops_ray.features.push import ensure_writer, find_writer, push_events, stop_writer

    features = declare()
    event = {"shop": "north", "till": 1, "amount": 2.5, "at": "2024-01-01T00:00:00Z"}
    with pytest.raises(FeatureStoreError, match="nothing takes in events"):
        find_writer("pushes")
    assert push_events(features, home, "pushes", "payments", [event]) == 1
    try:
        with pytest.raises(RequestError, match="row 0, till: must be a whole number") as caught:
            push_events(features, home, "pushes", "payments", [event | {"till": "1"}])
        assert caught.value.field == "till"
        handle = find_writer("pushes")
        wider = declare(offline={"buckets": 4})
        assert ensure_writer(features, home, "pushes") == handle
        push_events(wider, home, "pushes", "payments", [event | {"till": 2}])
        ray_cluster.get(ensure_writer(wider, home, "pushes").commit.remote())
        offline = OfflineStore(home.offline("pushes"), features)
        assert sorted(offline.read("newest")["till"].to_pylist()) == [1, 2]
    finally:
        stop_writer("pushes")
