"""The monitor reads the prediction log: each row counts once, whoever dies and whenever."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving.log_samples import ALONE, AT, AT_US, REFERENCE, answered, open_log

from mlops_ray.config.monitoring import Loop, Monitoring
from mlops_ray.errors import ServingError
from mlops_ray.loop import controller, world
from mlops_ray.loop.controller import Controller, ControllerSpec
from mlops_ray.loop.state import ControllerState, StateStore
from mlops_ray.loop.world import ServeWorld
from mlops_ray.metadata.delta import Delta
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.prediction_log import news
from mlops_ray.metadata.prediction_log.layout import readers_folder, replica_folder, segments
from mlops_ray.metadata.prediction_log.news import keep_from, read_news, wanted_from
from mlops_ray.metadata.prediction_log.reading import (
    read_labels,
    read_predictions,
    scan_predictions,
)
from mlops_ray.metadata.profile import Counts
from mlops_ray.metadata.types import Endpoint
from mlops_ray.monitoring.labels import LabelJoin
from mlops_ray.monitoring.measurement import Measurement, ServedVersion
from mlops_ray.monitoring.monitor import Monitor
from mlops_ray.serving.deployment import deploy
from mlops_ray.serving.formats.feedback import Feedback
from mlops_ray.serving.log.compaction import compact


class LogWorld:
    """A world whose news are those of a real prediction log."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def flush(self) -> None: ...

    def news(self, positions: Mapping[str, int]) -> Delta | None:
        keep_from(self.log, "monitor", positions)
        return read_news(self.log, positions)

    def served(self) -> ServedVersion:
        return ServedVersion(version=1, reference_digest=REFERENCE.digest)

    def reference(self, served: ServedVersion) -> Mapping[str, Counts]:
        return REFERENCE.profile.counts

    def record(self, kind: str, data: Mapping[str, Any]) -> None: ...

    def publish(self, state: ControllerState, measurement: Measurement | None) -> None: ...


class Bench:
    """A controller over a log; ``restart`` is a kill, after which a new one goes on."""

    def __init__(self, folder: Path) -> None:
        self.log, self.state, self.rows = folder / "log", folder / "state", 0
        self.ticks = 0
        self.spec = ControllerSpec(
            project="p",
            home=str(folder),
            endpoint=Endpoint(name="p", url="http://x", versions={}),
            monitoring=Monitoring.model_validate(
                {"every": "1h", "drift": {"window": "3d"}, "performance": {"window": "3d"}}
            ),
            loop=Loop.model_validate({"cooldown": "5d"}),
            clock="virtual",
        )
        self.restart()

    def restart(self) -> None:
        jobs: Any = None
        store = StateStore(self.state)
        self.controller = Controller(self.spec, store, jobs, LogWorld(self.log))

    def answer(self) -> None:
        """A replica of its own answers and is gone."""

        async def go() -> None:
            log = open_log(self.log, f"r{self.rows}")
            for _ in range(2):
                log.add(answered([f"{self.rows}-{row}" for row in range(3)]))
                await log.flush()
                self.rows += 3
            await log.close()

        asyncio.run(go())

    def take(self) -> None:
        self.controller.take_in()

    def tick(self) -> None:
        self.ticks += 1
        self.controller.tick(AT + timedelta(hours=self.ticks))

    def compact(self) -> None:
        assert compact(self.log) is not None

    def die_in_between(self) -> None:
        """A kill after the news were read and before they were kept."""

        def journal(delta: Delta) -> None:
            raise KeyboardInterrupt

        self.controller._store.journal = journal  # type: ignore[method-assign]
        if read_news(self.log, self.controller._monitor.positions) is not None:
            with pytest.raises(KeyboardInterrupt):
                self.controller.take_in()
        self.restart()


ACTS = ("answer", "take", "tick", "compact", "restart", "die_in_between")


@settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(acts=st.lists(st.sampled_from(ACTS), max_size=9))
def test_each_row_counts_once(tmp_path_factory: pytest.TempPathFactory, acts: list[str]) -> None:
    bench = Bench(tmp_path_factory.mktemp("news"))
    bench.take()
    for act in acts:
        getattr(bench, act)()
    bench.tick()
    status = bench.controller.status()
    assert status["rows_observed"] == bench.rows
    assert status["measurement"]["drift"]["rows"] == bench.rows
    bench.take()
    bench.compact()
    assert not any(segments(bench.log).values())


def test_a_session_that_begins_anew_hears_nothing_of_before(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.answer()
    assert bench.controller.begin("one")["rows_observed"] == 0
    bench.tick()
    assert bench.controller.status()["rows_observed"] == 0
    bench.answer()
    bench.tick()
    bench.controller.checkpoint("here")
    bench.answer()
    assert bench.controller.begin("one", "here")["rows_observed"] == 6
    bench.tick()
    assert bench.controller.status()["rows_observed"] == 6


def test_the_world_keeps_the_log_from_removing_what_it_has_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Home(tmp_path).predictions("p")

    async def go() -> None:
        writer = open_log(log)
        writer.add(answered(["a"]))
        await writer.close()

    asyncio.run(go())
    bench = Bench(tmp_path)
    monkeypatch.setattr(world, "open_ledger", lambda home: None)
    monkeypatch.setattr(world, "MonitorMetrics", lambda project: None)
    serve = ServeWorld(bench.spec)
    news = serve.news({})
    assert news is not None
    assert compact(log) is not None
    assert any(segments(log).values())
    assert serve.news(news.positions) is None
    assert compact(log) is not None
    assert not any(segments(log).values())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    told=st.lists(
        st.tuples(
            st.sampled_from("rs"), st.sampled_from("ab"), st.integers(0, 1), st.integers(-3, 3)
        ),
        max_size=8,
    )
)
def test_the_monitor_and_the_readers_of_the_log_mean_the_same_label(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[str, str, int, int]]
) -> None:
    """Replica, id, label, and by how many days it was known before or after the horizon's end."""
    folder, day, horizon = tmp_path_factory.mktemp("labels"), 86_400_000_000, timedelta(days=2)
    clock_ns = count(AT_US * 1000, 1000)

    async def go() -> None:
        logs = {name: open_log(folder, name) for name in "rs"}
        logs["r"].add(answered(["a", "b"], times_us=[AT_US, AT_US]))
        for name, identifier, label, late in told:
            known_at = AT_US + 2 * day + late * day // 3
            logs[name].add_labels(Feedback([identifier], [label], [known_at]))
        for log in logs.values():
            await log.close()

    with patch("time.time_ns", lambda: next(clock_ns)):
        asyncio.run(go())
    expected = {i: label for _, i, label, late in told if late <= 0}
    found = read_news(folder, {})
    assert found is not None
    joined = LabelJoin(horizon, horizon)
    joined.add_predictions(found.predictions)
    joined.add_labels(found.labels)
    rows = joined.rows(AT - timedelta(days=1), AT + timedelta(days=1))
    by_monitor = {row["id"]: row["label"] for row in rows.to_pylist() if row["label"] is not None}
    assert by_monitor == expected
    for _ in range(2):
        table = read_labels(folder, horizon=horizon)
        assert {row["id"]: row["label"] for row in table.to_pylist()} == expected
        compact(folder)


def logged(folder: Path, *groups: Any, replica: str = "r", **settings: Any) -> None:
    """Write each group of answers as a frame."""

    async def go() -> None:
        log = open_log(folder, replica, **settings)
        for group in groups:
            log.add(group)
            await log.flush()
        await log.close()

    asyncio.run(go())


YEAR_0_US = -62_135_596_800_000_000 - 14 * 3_600_000_000


def test_a_time_that_no_calendar_has_does_not_hide_the_rest(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    logged(
        bench.log, answered(["a", "b"]), answered(["odd"], times_us=[YEAR_0_US]), answered(["c"])
    )
    bench.tick()
    status = bench.controller.status()
    assert status["rows_observed"] == 4
    assert status["measurement"]["drift"]["rows"] == 3


def test_what_cannot_be_taken_in_is_not_passed_over() -> None:
    windows = {"drift": {"window": "3d"}, "performance": {"window": "3d"}}
    monitor = Monitor(Monitoring.model_validate({"every": "1h", **windows}))
    wrong: Any = "no table"
    with pytest.raises(AttributeError):
        monitor.observe(Delta({}, wrong, wrong, {"r": 1}))
    assert monitor.positions == {}


def test_models_by_name_are_in_the_log_and_no_news(tmp_path: Path) -> None:
    log = tmp_path / "log"
    other = replace(ALONE, name="other")
    logged(log, answered(["own"]), answered(["x", "y"], other), sample=0.5)
    logged(log, answered(["mine", "theirs"]), answered(["z"], other), replica="s")
    found = read_news(log, {})
    assert found is not None
    assert sorted(found.predictions["id"].to_pylist()) == ["mine", "own", "theirs"]
    ((profile,),) = [days.values() for days in found.buckets.values()]
    assert profile.rows == 3
    for _ in range(2):
        rows = read_predictions(log, ids=["mine", "z"]).to_pylist()
        assert {row["id"]: row["model"] for row in rows} == {"mine": None, "z": "other"}
        compact(log)


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    log = tmp_path / "log"
    logged(log, answered(["a"]))
    (segment,) = next(iter(segments(log).values()))
    for number in range(70):
        for folder in (
            replica_folder(log, f"batch-job-{number}"),
            replica_folder(log, f"n{number}"),
        ):
            folder.mkdir()
            shutil.copy(segment.path, folder)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, limits[1]))
    try:
        found = read_news(log, {})
        assert found is not None
        assert len(found.predictions) == 71
        read_predictions(log)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_files_that_are_being_read_stay(tmp_path: Path) -> None:
    log = tmp_path / "log"
    logged(log, answered(["a"]))
    logged(log, answered(["b"]), replica="s")
    rows = scan_predictions(log)
    first = next(rows)
    assert compact(log) is not None
    assert len([file for files in segments(log).values() for file in files]) == 2
    assert [*first["id"].to_pylist(), *(i for t in rows for i in t["id"].to_pylist())] == ["a", "b"]
    assert compact(log) is not None
    assert not any(segments(log).values())


def test_a_reader_that_cannot_read_does_not_keep_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "open_ledger", lambda home: None)
    monkeypatch.setattr(world, "MonitorMetrics", lambda project: None)

    def fail(*_: Any) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(world, "read_news", fail)
    serve = ServeWorld(Bench(tmp_path).spec)
    with pytest.raises(OSError, match="too many"):
        serve.news({})
    assert wanted_from(Home(tmp_path).predictions("p")) == []


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b'{"r": null}'])
def test_a_damaged_file_of_a_reader_wants_everything(tmp_path: Path, damaged: bytes) -> None:
    logged(tmp_path, answered(["a"]))
    keep_from(tmp_path, "monitor", {})
    (readers_folder(tmp_path) / "monitor.json").write_bytes(damaged)
    assert wanted_from(tmp_path) == [{}]
    assert compact(tmp_path) is not None
    assert any(segments(tmp_path).values())


def test_replicas_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for number in range(4):
        logged(bench.log, answered([f"a{number}"]), replica=f"r{number}")
        bench.take()
        bench.tick()
        bench.compact()
        for replica in segments(bench.log):
            shutil.rmtree(replica_folder(bench.log, replica))
    assert list(bench.controller._monitor.positions) == [
        name for name in bench.controller._monitor.positions if name.startswith("r3-")
    ]
    assert bench.controller.status()["rows_observed"] == 4


def test_taking_in_ends_where_replicas_write_faster_than_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "_MOST_FRAMES", 2)
    monkeypatch.setattr(controller, "_MOST_PASSES", 3)
    bench = Bench(tmp_path)
    logged(bench.log, *[answered([str(number)]) for number in range(10)])
    assert not bench.controller.take_in()
    assert bench.controller.status()["rows_observed"] == 6
    assert bench.controller.take_in()
    assert bench.controller.status()["rows_observed"] == 10
    assert bench.controller.take_in()

    endless = bench.controller._world.news

    def busy(positions: Mapping[str, int]) -> Delta | None:
        found = endless(positions)
        logged(bench.log, answered(["more"]), replica=f"s{len(positions)}")
        return found

    monkeypatch.setattr(bench.controller._world, "news", busy)
    logged(bench.log, answered(["again"]), replica="s")
    assert bench.controller.take_in()
    assert bench.controller.begin("new")["rows_observed"] == 0


def test_the_world_asks_replicas_and_no_guarded_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "open_ledger", lambda home: None)
    monkeypatch.setattr(world, "MonitorMetrics", lambda project: None)
    monkeypatch.setattr(world, "_evaluation", lambda home, ref: None)
    (tmp_path / "reference.json").write_text(json.dumps(REFERENCE.to_json()))
    answers = [
        {"answer": "champion", "versions": {"champion": n}, "packages": {"champion": str(tmp_path)}}
        | {"epoch": n}
        for n in (2, 3, 1)
    ]
    asked: list[tuple[str, str]] = []

    def ask_all(project: str, method: str, timeout_s: float) -> list[Any]:
        asked.append((project, method))
        return answers

    monkeypatch.setattr(deploy, "ask_all", ask_all)
    monkeypatch.setattr(deploy, "ask_one", lambda project, timeout_s: answers[2])
    serve = ServeWorld(Bench(tmp_path).spec)
    assert serve.served().version == 3
    assert asked == [("p", "describe")]
    monkeypatch.setattr(deploy, "ask_all", lambda *_: [])
    assert serve.served().version == 1

    def gone(*_: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(deploy, "ask_all", gone)
    with pytest.raises(ServingError, match="does not say what it serves"):
        serve.served()
