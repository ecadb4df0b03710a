"""The monitor reads the prediction log: each row counts once, whoever dies and whenever."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving.log_samples import AT, REFERENCE, answered, open_log

from mlops_ray.config.monitoring import Loop, Monitoring
from mlops_ray.loop import world
from mlops_ray.loop.controller import Controller, ControllerSpec
from mlops_ray.loop.state import ControllerState, StateStore
from mlops_ray.loop.world import ServeWorld
from mlops_ray.metadata.delta import Delta
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.prediction_log.layout import segments
from mlops_ray.metadata.prediction_log.news import keep_from, read_news
from mlops_ray.metadata.profile import Counts
from mlops_ray.metadata.types import Endpoint
from mlops_ray.monitoring.measurement import Measurement, ServedVersion
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
