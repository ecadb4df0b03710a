from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlops_ray.config.monitoring import Loop, Monitoring
from mlops_ray.errors import ClusterError, MonitoringError
from mlops_ray.loop.controller import Controller, ControllerSpec, deadline
from mlops_ray.loop.state import ControllerState, StateStore
from mlops_ray.metadata.delta import LABEL_SCHEMA, Delta, prediction_schema
from mlops_ray.metadata.profile import Counts, Reference
from mlops_ray.metadata.types import Endpoint
from mlops_ray.monitoring.measurement import Measurement, ServedVersion
from mlops_ray.orchestration.jobs import JobCommand, JobOutcome, shell_line

START = datetime(2013, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
REFERENCE = Reference.fit({"x": np.arange(1000.0)}, 4)


class Cluster:
    """Jobs that end when the test says so; remembers what was submitted, across controllers."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, str]] = []
        self.known: dict[str, JobOutcome] = {}
        self.down = False

    def submit(self, submission_id: str, command: JobCommand) -> None:
        if self.down:
            raise ClusterError("no dashboard")
        if submission_id not in self.known:
            self.submitted.append((submission_id, command.argv[-1].removeprefix("until=")))
            self.known[submission_id] = JobOutcome(status="running")

    def outcomes(self, submission_ids: Iterable[str]) -> dict[str, JobOutcome]:
        if self.down:
            raise ClusterError("no dashboard")
        return {i: self.known.get(i, JobOutcome(status="lost")) for i in submission_ids}

    def stop(self, submission_id: str) -> None: ...

    def end(self, **outcome: Any) -> None:
        self.known[self.submitted[-1][0]] = JobOutcome(**outcome)


class World:
    def __init__(self) -> None:
        self.version = 1
        self.flushed = 0
        self.events: list[tuple[str, dict[str, Any]]] = []

    def flush(self) -> None:
        self.flushed += 1

    def news(self, positions: Mapping[str, int]) -> Delta | None:
        return None

    def served(self) -> ServedVersion:
        return ServedVersion(version=self.version, reference_digest=REFERENCE.digest)

    def reference(self, served: ServedVersion) -> Mapping[str, Counts]:
        return REFERENCE.profile.counts

    def record(self, kind: str, data: Mapping[str, Any]) -> None:
        self.events.append((kind, dict(data)))

    def publish(self, state: ControllerState, measurement: Measurement | None) -> None:
        pass


class Bench:
    """A controller that can be killed: ``restart`` makes a new one from what is on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs, self.world = folder, Cluster(), World()
        self.spec = ControllerSpec(
            project="p",
            home=str(folder),
            endpoint=Endpoint(name="p", url="http://x", versions={"champion": 1}),
            monitoring=Monitoring.model_validate(
                {
                    "every": "1d",
                    "drift": {"window": "3d", "min_features": 1, "min_rows": 10},
                    "performance": {"window": "3d"},
                }
            ),
            loop=Loop.model_validate({"cooldown": "5d"}),
            retrain=JobCommand(argv=("train",)),
            clock="virtual",
        )
        self.restart()

    def restart(self) -> None:
        self.controller = Controller(self.spec, StateStore(self.folder), self.jobs, self.world)

    def observe(self, day: int, values: list[float]) -> None:
        ids = [f"{day}-{row}" for row in range(len(values))]
        at = START + day * DAY
        columns = [ids, [at] * len(ids), [0.5] * len(ids), [self.world.version] * len(ids)]
        schema = prediction_schema()
        arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
        self.controller.observe(
            Delta(
                buckets={
                    REFERENCE.digest: {
                        at.date().isoformat(): REFERENCE.bin({"x": np.array(values)})
                    }
                },
                predictions=pa.Table.from_arrays(arrays, schema=schema),
                labels=LABEL_SCHEMA.empty_table(),
                positions={f"r{day}": 1},
            )
        )

    def drift(self, day: int) -> None:
        self.observe(day, [5000.0] * 50)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "monitor")


def test_a_whole_circle(bench: Bench) -> None:
    bench.observe(0, list(np.arange(0.0, 1000.0, 10)))
    calm = bench.controller.tick(START + DAY)
    assert (calm["phase"], calm["decision"]["action"]) == ("watching", "wait")

    bench.drift(1)
    bench.drift(2)
    status = bench.controller.tick(START + 3 * DAY)
    assert status["phase"] == "retraining"
    assert bench.jobs.submitted == [("p-retrain-1-20130304T000000Z", "2013-03-04T00:00:00Z")]
    assert deadline(status, timedelta(hours=6)) == START + 3 * DAY + timedelta(hours=6)
    assert bench.controller.tick(START + 4 * DAY)["decision"]["action"] == "wait"
    assert bench.controller.poll()["phase"] == "retraining"

    bench.world.version = 2
    bench.jobs.end(status="succeeded")
    status = bench.controller.poll(START + 3.2 * DAY)
    assert (status["phase"], status["promotions"], status["failures"]) == ("watching", 1, 0)
    assert status["served"]["version"] == 2
    assert deadline(status, DAY) is None

    kinds = [entry["kind"] for entry in bench.controller.history()]
    assert kinds == [
        "served",
        "measured",
        "measured",
        "trigger",
        "measured",
        "served",
        "retraining",
    ]
    (trigger,) = bench.controller.history("trigger")
    assert trigger["reason"].startswith("drift: PSI")
    assert trigger["evidence"]["drifted_features"] == 1
    told = ["measured", "measured", "trigger", "measured", "retraining"]
    assert [kind for kind, _ in bench.world.events] == told
    assert bench.world.events[-1][1]["promoted"] is True


def test_failed_job_is_recorded_and_counts_for_the_cooldown(bench: Bench) -> None:
    bench.drift(0)
    bench.controller.tick(START + DAY)
    bench.jobs.end(status="failed", message="exit 3", log="Traceback: too few rows")
    status = bench.controller.poll(START + 1.1 * DAY)
    assert (status["phase"], status["failures"], status["promotions"]) == ("watching", 1, 0)
    (ended,) = bench.controller.history("retraining")
    assert (ended["outcome"], ended["message"]) == ("failed", "exit 3")
    assert ended["log"] == "Traceback: too few rows"
    for day in range(1, 8):
        bench.drift(day)
        bench.controller.tick(START + (day + 1) * DAY)
    times = [until for _, until in bench.jobs.submitted]
    assert times == ["2013-03-02T00:00:00Z", "2013-03-07T00:00:00Z"]  # five days apart


def test_a_retraining_that_is_held_back_starts_when_told(bench: Bench) -> None:
    bench.drift(0)
    assert bench.controller.tick(START + DAY, start=False)["phase"] == "triggered"
    assert bench.jobs.submitted == []
    bench.restart()
    assert bench.controller.status()["phase"] == "triggered"
    assert bench.controller.start_retraining()["phase"] == "retraining"
    assert bench.controller.start_retraining()["phase"] == "retraining"
    assert len(bench.jobs.submitted) == 1


def test_the_same_moment_is_judged_once(bench: Bench) -> None:
    bench.drift(0)
    for _ in range(3):
        bench.controller.tick(START + DAY)
    bench.controller.tick(START)
    assert len(bench.controller.history("measured")) == 1
    assert len(bench.jobs.submitted) == 1


def test_killed_at_any_point_it_goes_on(bench: Bench) -> None:
    bench.observe(0, [1.0] * 6)
    bench.restart()  # the delta was only in the journal
    bench.observe(1, [5000.0] * 6)
    bench.restart()
    bench.observe(1, [5000.0] * 6)  # told again, it changes nothing
    status = bench.controller.tick(START + 2 * DAY)
    assert status["rows_observed"] == 12
    assert status["measurement"]["drift"]["rows"] == 12
    assert status["phase"] == "retraining"
    bench.restart()
    bench.world.version = 2
    bench.jobs.end(status="succeeded")
    status = bench.controller.poll()
    assert (status["phase"], status["promotions"], status["retrainings"]) == ("watching", 1, 1)
    bench.restart()
    assert bench.controller.status()["promotions"] == 1
    assert len(bench.controller.history("retraining")) == 1
    assert bench.controller.rows(START, START + 9 * DAY)["id"].to_pylist()[0] == "0-0"


def test_killed_between_submitting_and_remembering_it_does_not_submit_twice(bench: Bench) -> None:
    bench.drift(0)
    bench.controller.tick(START + DAY, start=False)
    bench.jobs.submit("p-retrain-1-20130302T000000Z", bench.spec.retrain)  # then it died
    bench.restart()
    assert bench.controller.start_retraining()["phase"] == "retraining"
    assert len(bench.jobs.submitted) == 1


def test_a_job_that_its_cluster_lost_is_submitted_again(bench: Bench) -> None:
    bench.drift(0)
    bench.controller.tick(START + DAY)
    bench.jobs.known.clear()  # a new cluster
    assert bench.controller.poll()["phase"] == "retraining"
    assert len(bench.jobs.submitted) == 2
    assert bench.jobs.submitted[0] == bench.jobs.submitted[1]
    for _ in range(3):
        bench.jobs.known.clear()
        status = bench.controller.poll()
    assert (status["phase"], status["failures"]) == ("watching", 1)
    assert len(bench.jobs.submitted) == 3


def test_an_unreachable_cluster_fails_a_submission_but_not_a_poll(bench: Bench) -> None:
    bench.drift(0)
    bench.jobs.down = True
    status = bench.controller.tick(START + DAY)
    assert (status["phase"], status["failures"]) == ("watching", 1)
    bench.jobs.down = False
    bench.drift(6)
    bench.controller.tick(START + 7 * DAY)
    bench.jobs.down = True
    assert bench.controller.poll()["phase"] == "retraining"


def test_checkpoint_brings_back_what_was_and_forgets_what_came_after(bench: Bench) -> None:
    bench.controller.begin("run-a")
    bench.observe(0, list(np.arange(0.0, 1000.0, 50)))
    bench.controller.tick(START + DAY)
    bench.controller.checkpoint("day1")
    before = bench.controller.status(), bench.controller.history()
    bench.drift(1)
    bench.controller.tick(START + 2 * DAY)
    assert bench.controller.status()["phase"] == "retraining"
    bench.restart()
    bench.controller.begin("run-a", "day1")
    after = bench.controller.status()
    assert bench.controller.history() == before[1]
    assert after["rows_observed"] == 20
    assert (after["phase"], after["now"]) == ("watching", before[0]["now"])
    bench.restart()
    assert bench.controller.status() == after
    with pytest.raises(MonitoringError, match="no checkpoint 'day9'"):
        bench.controller.begin("run-a", "day9")
    assert bench.controller.begin("run-b")["rows_observed"] == 0
    assert bench.controller.history() == []


def test_observing_while_a_tick_waits_for_the_replicas(bench: Bench) -> None:
    def flush() -> None:
        reporter = threading.Thread(target=bench.observe, args=(0, [5000.0] * 20))
        reporter.start()
        reporter.join(timeout=20)
        assert not reporter.is_alive()

    bench.world.flush = flush  # type: ignore[method-assign]
    assert bench.controller.tick(START + DAY)["measurement"]["drift"]["rows"] == 20


def test_half_a_line_in_the_history_is_cut_off(bench: Bench) -> None:
    bench.controller.tick(START + DAY)
    with (bench.folder / "history.jsonl").open("a") as file:
        file.write('{"kind": "meas')
    bench.restart()
    assert [entry["kind"] for entry in bench.controller.history()] == ["served", "measured"]


def test_configure_keeps_the_memory(bench: Bench) -> None:
    bench.observe(0, [1.0] * 20)
    loop = bench.spec.loop.model_copy(update={"max_retrainings": 0})
    bench.controller.configure(bench.spec.model_copy(update={"loop": loop}))
    bench.drift(1)
    status = bench.controller.tick(START + 2 * DAY)
    assert status["decision"]["reason"].startswith("all 0 retrainings have been made")
    assert status["rows_observed"] == 70


def test_without_a_command_nothing_is_retrained(bench: Bench) -> None:
    bench.spec = bench.spec.model_copy(update={"retrain": None})
    bench.restart()
    bench.drift(0)
    status = bench.controller.tick(START + DAY)
    assert (status["decision"]["action"], status["phase"]) == ("retrain", "watching")


def test_shell_line_is_quoted_and_understood_by_hydra() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    command = JobCommand(argv=("python", "-c", "print('a b')"), directory="/some where")
    line = shell_line(command.with_more("until=2013-05-03T00:00:00Z"))
    assert line == (
        "cd '/some where' && exec python -c 'print('\"'\"'a b'\"'\"')' until=2013-05-03T00:00:00Z"
    )
    parsed = OverridesParser.create().parse_override(line.split()[-1])
    assert (parsed.key_or_group, parsed.value()) == ("until", "2013-05-03T00:00:00Z")
