"""The controller as a real actor that is really killed, with real Ray jobs."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlops_ray.config.monitoring import Loop, Monitoring
from mlops_ray.errors import MonitoringError
from mlops_ray.loop import actor
from mlops_ray.loop.controller import ControllerSpec
from mlops_ray.loop.state import ControllerState
from mlops_ray.metadata.delta import LABEL_SCHEMA, MONITOR_NAMESPACE, Delta, prediction_schema
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.profile import Counts, Reference
from mlops_ray.metadata.types import Endpoint
from mlops_ray.monitoring.measurement import Measurement, ServedVersion
from mlops_ray.orchestration.jobs import JobCommand

START = datetime(2013, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
REFERENCE = Reference.fit({"x": np.arange(1000.0)}, 4)
PATIENCE_S = 90.0


class FileWorld:
    """A world whose endpoint serves the version that a file names, and tells what files hold."""

    def __init__(self, spec: ControllerSpec) -> None:
        self._home = Home(Path(spec.home))
        self._project = spec.project

    def flush(self) -> None: ...

    def news(self, positions: Mapping[str, int]) -> Delta | None:
        for file in sorted(self._home.root.glob("*.delta")):
            delta: Delta = pickle.loads(file.read_bytes())
            if delta.positions.keys() - positions.keys():
                return delta
        return None

    def served(self) -> ServedVersion:
        version = int((self._home.root / "version").read_text())
        return ServedVersion(version=version, reference_digest=REFERENCE.digest)

    def reference(self, served: ServedVersion) -> Mapping[str, Counts]:
        return REFERENCE.profile.counts

    def record(self, kind: str, data: Mapping[str, Any]) -> None:
        Ledger(self._home.ledger_url).append(self._project, kind, dict(data))

    def publish(self, state: ControllerState, measurement: Measurement | None) -> None: ...


def spec(home: Home, project: str, script: str, clock: str = "virtual") -> ControllerSpec:
    home.root.mkdir(parents=True)
    (home.root / "version").write_text("1")
    return ControllerSpec.model_validate(
        {
            "project": project,
            "home": str(home.root),
            "endpoint": Endpoint(name=project, url="http://x", versions={}),
            "monitoring": Monitoring.model_validate(
                {
                    "every": "1d" if clock == "virtual" else "1s",
                    "drift": {"window": "3d", "min_features": 1, "min_rows": 10},
                    "performance": {"window": "3d"},
                }
            ),
            "loop": Loop.model_validate({"cooldown": "5d"}),
            "retrain": JobCommand(
                argv=(sys.executable, "-c", script, str(home.root)), env={"SEEN": "by the job"}
            ),
            "clock": clock,
        }
    )


def drift(day: int) -> Delta:
    at = START + day * DAY
    columns = [[f"{day}-{row}" for row in range(20)], [at] * 20, [0.5] * 20, [1] * 20]
    schema = prediction_schema()
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return Delta(
        buckets={
            REFERENCE.digest: {at.date().isoformat(): REFERENCE.bin({"x": np.full(20, 5000.0)})}
        },
        predictions=pa.Table.from_arrays(arrays, schema=schema),
        labels=LABEL_SCHEMA.empty_table(),
        positions={f"r{day}": 1},
    )


def tell(home: Home, delta: Delta) -> None:
    draft = home.root / "draft"
    draft.write_bytes(pickle.dumps(delta))
    draft.rename(home.root / f"{next(iter(delta.positions))}.delta")


def taken_in(handle: Any, rows: int) -> None:
    """Wait until the actor has taken so many rows in by itself."""
    import ray

    give_up_s = time.monotonic() + PATIENCE_S
    while ray.get(handle.status.remote())["rows_observed"] < rows:
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


def kill(project: str) -> int:
    """Kill the actor's process as the kernel would; return its pid."""
    from ray.util.state import list_actors

    (found,) = list_actors(
        filters=[("name", "=", actor.actor_name(project)), ("state", "=", "ALIVE")]
    )
    os.kill(found.pid, signal.SIGKILL)
    return int(found.pid)


def wait_for_phase(monitor: actor.RemoteMonitor, phase: str, now: datetime) -> dict[str, Any]:
    async def wait() -> dict[str, Any]:
        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            status = await monitor.poll(now)
            if status["phase"] == phase or time.monotonic() > give_up_s:
                return status
            await asyncio.sleep(0.2)

    return asyncio.run(wait())


def test_killed_while_observing_and_while_retraining(ray_cluster: Any, home: Home) -> None:
    script = (
        "import os, pathlib, sys, time\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "while not (root / 'go').exists(): time.sleep(0.1)\n"
        "(root / 'version').write_text('2')\n"
        "(root / 'until').write_text(sys.argv[2] + os.environ['SEEN'])\n"
    )
    handle = actor.ensure(spec(home, "killed", script), FileWorld)
    monitor = actor.RemoteMonitor(handle)
    try:
        ray_cluster.get(handle.begin.remote("session"))
        tell(home, drift(0))
        taken_in(handle, 20)
        kill("killed")
        status = asyncio.run(monitor.tick(START + DAY))
        assert status["rows_observed"] == 20
        assert (status["session"], status["phase"]) == ("session", "triggered")
        assert asyncio.run(monitor.start_retraining())["phase"] == "retraining"
        kill("killed")
        (home.root / "go").touch()
        status = wait_for_phase(monitor, "watching", START + DAY)
        assert (status["promotions"], status["failures"]) == (1, 0)
        assert status["served"]["version"] == 2
        assert (home.root / "until").read_text() == "until=2013-03-02T00:00:00Zby the job"
        kinds = [entry["kind"] for entry in asyncio.run(monitor.history())]
        assert kinds == ["served", "measured", "trigger", "served", "retraining"]
        found = Ledger(home.ledger_url).events(project="killed")
        events = [event for event in found if event.kind != "measured"]
        assert [event.kind for event in events] == ["trigger", "retraining"]
        assert events[0].data["evidence"]["drifted_features"] == 1
        assert actor.ensure(spec(Home(home.root / "b"), "killed", ""), FileWorld) == handle
    finally:
        actor.stop("killed")
    with pytest.raises(MonitoringError, match="no monitor runs for project 'killed'"):
        actor.find("killed")


def test_a_failing_job_on_the_wall_clock(ray_cluster: Any, home: Home) -> None:
    """With a wall clock the actor judges by itself; nobody ticks here."""
    script = "import sys; print('too few rows'); sys.exit(3)"
    wall = spec(home, "failing", script, "wall")
    today = drift((datetime.now(UTC) - START) // DAY)
    handle = actor.ensure(wall, FileWorld)
    try:
        tell(home, today)
        give_up_s = time.monotonic() + PATIENCE_S
        history: list[dict[str, Any]] = []
        while not history and time.monotonic() < give_up_s:
            history = ray_cluster.get(handle.history.remote("retraining"))
            time.sleep(0.2)
        (ended,) = history
        assert (ended["outcome"], ended["promoted"]) == ("failed", False)
        assert "too few rows" in ended["log"]
        status = ray_cluster.get(handle.status.remote())
        assert (status["retrainings"], status["failures"]) == (1, 1)
        while "under way" in status["decision"]["reason"] and time.monotonic() < give_up_s:
            time.sleep(0.2)  # the last judgement may be from before the job ended
            status = ray_cluster.get(handle.status.remote())
        assert "since the last retraining" in status["decision"]["reason"]
        assert ray_cluster.get_actor("mlops-ray-monitor:failing", namespace=MONITOR_NAMESPACE)
    finally:
        actor.stop("failing")
