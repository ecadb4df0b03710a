from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from aiohttp import web

from mlops_ray.config.features import Labels
from mlops_ray.config.monitoring import Loop, Monitoring, Replay
from mlops_ray.errors import SchemaError
from mlops_ray.loop.controller import Controller, ControllerSpec
from mlops_ray.loop.recording import Recording
from mlops_ray.loop.replay import Replayer
from mlops_ray.loop.results import ReplayResult
from mlops_ray.loop.state import ControllerState, StateStore
from mlops_ray.loop.summary import summarise
from mlops_ray.loop.traffic import Traffic
from mlops_ray.metadata.delta import LABEL_SCHEMA, Delta, prediction_schema
from mlops_ray.metadata.profile import Counts, Reference
from mlops_ray.metadata.types import Endpoint
from mlops_ray.monitoring.measurement import Measurement, ServedVersion
from mlops_ray.orchestration.jobs import JobCommand, JobOutcome
from mlops_ray.serving.client.http import AsyncClient

START = datetime(2013, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
DAYS = 12
LABELS = Labels(source="flights", id="id", time="at", label="late", known_at="known")
REFERENCE = Reference.fit({"distance": np.arange(1000.0)}, 4)
MONITORING = Monitoring.model_validate(
    {
        "every": "1d",
        "drift": {"window": "3d", "min_features": 1, "min_rows": 50},
        "performance": {"window": "3d", "min_rows": 10_000},
    }
)
LOOP = Loop.model_validate({"cooldown": "30d", "budget": "6h"})
REPLAY = Replay(start=START, end=START + DAYS * DAY, step="1h", concurrency=4)  # type: ignore[arg-type]


class KilledError(BaseException):
    """The process ends here."""


def history() -> pa.Table:
    """Flights at odd minutes, several at some; the distance drifts off; every ninth is cancelled."""
    chance = np.random.default_rng(5)
    rows = []
    for number in range(DAYS * 40):
        at = START + timedelta(minutes=36 * number - number % 3 * 36)
        cancelled = number % 9 == 0
        rows.append(
            {
                "id": f"f{number}",
                "at": at,
                "carrier": None if number % 7 == 0 else "UA",
                "distance": float(chance.integers(0, 1000) + 60 * (number // 40)),
                "late": None if cancelled else bool(chance.random() < 0.3),
                "known": None if cancelled else at + timedelta(hours=5, seconds=number),
                "arrival": "a fact of the future",
            }
        )
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("at", pa.timestamp("us", tz="UTC")),
            ("carrier", pa.string()),
            ("distance", pa.float64()),
            ("late", pa.bool_()),
            ("known", pa.timestamp("us", tz="UTC")),
            ("arrival", pa.string()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema).take(chance.permutation(len(rows)))


TABLE = history()
TRAFFIC = Traffic(TABLE, ["at", "carrier", "distance"], LABELS, REPLAY.start, REPLAY.end)


class StandIn:
    """The endpoint's HTTP contract, a monitor's world and a cluster's jobs, all in one process.

    A retraining ends only when background requests have come in, hence while the replay waits.
    """

    def __init__(self) -> None:
        self.version = 1
        self.bodies: list[dict[str, Any]] = []
        self.labels: dict[str, int] = {}
        self.feedback_at: list[tuple[str, datetime]] = []
        self.broken: set[str] = set()
        self.background = 0
        self.jobs: dict[str, JobOutcome] = {}
        self.commits_at_submission: list[int] = []
        self.pipeline = Pipeline()
        self.controller: Controller | None = None
        self._flushes = 0
        self._predictions: list[tuple[str, str, float, int, float]] = []
        self._labels: list[tuple[str, int, str]] = []

    @staticmethod
    def score(row: Mapping[str, Any], version: int) -> float:
        return zlib.crc32(f"{row['distance']}{version}".encode()) / 2**32

    async def predict(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.broken & set(body["ids"]):
            return web.json_response(
                {"error": {"message": "boom", "field": None, "row": None}}, status=500
            )
        scores = [self.score(row, self.version) for row in body["rows"]]
        if request.headers.get("X-Mlops-Ray-Log") == "off":
            self.background += 1
        else:
            self.bodies.append(body)
            shadows = [self.score(row, 1) for row in body["rows"]]
            self._predictions += [
                (key, row["at"], score, self.version, shadow)
                for key, row, score, shadow in zip(
                    body["ids"], body["rows"], scores, shadows, strict=True
                )
            ]
        answer = {"model": "p", "version": self.version, "route": "champion"}
        answer |= {"ids": body["ids"], "scores": scores}
        return web.json_response(answer | {"labels": [int(score > 0.5) for score in scores]})

    async def feedback(self, request: web.Request) -> web.Response:
        labels = (await request.json())["labels"]
        for entry in labels:
            self.labels[entry["id"]] = entry["label"]
            self.feedback_at.append((entry["id"], self.pipeline.until))
            self._labels.append((entry["id"], entry["label"], entry["known_at"]))
        return web.json_response({"accepted": len(labels)})

    def flush(self) -> None:
        rows, self._predictions = self._predictions, []
        labels, self._labels = self._labels, []
        if not rows and not labels:
            return
        ids, times, scores, versions, shadows = zip(*rows, strict=True) if rows else ([],) * 5
        moments = [datetime.fromisoformat(time) for time in times]
        distance = dict(zip(TABLE["id"].to_pylist(), TABLE["distance"].to_pylist(), strict=True))
        buckets = {}
        for day in {moment.date().isoformat() for moment in moments}:
            chosen = [
                distance[i]
                for i, m in zip(ids, moments, strict=True)
                if m.date().isoformat() == day
            ]
            buckets[day] = REFERENCE.bin({"distance": np.array(chosen)})
        schema = prediction_schema(("first",))
        columns = [ids, moments, scores, versions, shadows]
        label_columns = [
            [entry[0] for entry in labels],
            [entry[1] for entry in labels],
            *[[datetime.fromisoformat(entry[2]) for entry in labels]] * 2,
        ]
        assert self.controller is not None
        self._flushes += 1
        self.controller.observe(
            Delta(
                buckets={REFERENCE.digest: buckets},
                predictions=_table(columns, schema),
                labels=_table(label_columns, LABEL_SCHEMA),
                positions={"replica": self._flushes},
            )
        )

    def news(self, positions: Mapping[str, int]) -> Delta | None:
        return None

    def served(self) -> ServedVersion:
        return ServedVersion(version=self.version, reference_digest=REFERENCE.digest)

    def reference(self, served: ServedVersion) -> Mapping[str, Counts]:
        return REFERENCE.profile.counts

    def record(self, kind: str, data: Mapping[str, Any]) -> None: ...

    def publish(self, state: ControllerState, measurement: Measurement | None) -> None: ...

    def submit(self, submission_id: str, command: JobCommand) -> None:
        if submission_id not in self.jobs:
            self.jobs[submission_id] = JobOutcome(status="running")
            self.background = 0
            self.commits_at_submission.append(len(self.pipeline.commits))

    def outcomes(self, submission_ids: Iterable[str]) -> dict[str, JobOutcome]:
        if self.background >= 3:
            self.version = 2
            self.jobs |= {name: JobOutcome(status="succeeded") for name in submission_ids}
        return {name: self.jobs[name] for name in submission_ids}

    def stop(self, submission_id: str) -> None: ...

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Endpoint]:
        app = web.Application()
        app.router.add_post("/v1/models/p/predict", self.predict)
        app.router.add_post("/v1/models/p/feedback", self.feedback)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            yield Endpoint(
                name="p", url=f"http://127.0.0.1:{port}", versions={"champion": 1, "first": 1}
            )
        finally:
            await runner.cleanup()


class Pipeline:
    """Keeps the time; raises where the test wants the process to die."""

    def __init__(self) -> None:
        self.until = START
        self.commits: list[datetime] = []
        self.die_at: datetime | None = None

    def advance(self, until: datetime, commit: bool = True) -> int:
        if self.die_at is not None and until >= self.die_at:
            raise KilledError
        self.until = until
        if commit:
            self.commit()
        return 0

    def commit(self) -> None:
        self.commits.append(self.until)


class Near:
    """The controller in this process, as ``LoopMonitor``."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def begin(self, session: str, checkpoint: str | None) -> dict[str, Any]:
        return self._controller.begin(session, checkpoint)

    async def checkpoint(self, name: str) -> None:
        self._controller.checkpoint(name)

    async def tick(self, now: datetime) -> dict[str, Any]:
        return self._controller.tick(now, start=False)

    async def start_retraining(self) -> dict[str, Any]:
        return self._controller.start_retraining()

    async def poll(self, now: datetime) -> dict[str, Any]:
        return self._controller.poll(now)

    async def history(self) -> list[dict[str, Any]]:
        return self._controller.history()

    async def rows(self, since: datetime, until: datetime) -> pa.Table:
        return self._controller.rows(since, until)


def play(folder: Path, server: StandIn, session: str = "run") -> ReplayResult:
    async def run() -> ReplayResult:
        async with server.running() as endpoint, AsyncClient(endpoint) as client:
            spec = ControllerSpec(
                project="p",
                home=str(folder),
                endpoint=endpoint,
                monitoring=MONITORING,
                loop=LOOP,
                retrain=JobCommand(argv=("train",)),
                clock="virtual",
            )
            server.controller = Controller(spec, StateStore(folder / "monitor"), server, server)
            replayer = Replayer(
                session,
                TRAFFIC,
                REPLAY,
                MONITORING,
                LOOP,
                client=client,
                pipeline=server.pipeline,
                monitor=Near(server.controller),
                recording=Recording(folder / "replay"),
            )
            return await replayer.run(endpoint.versions)

    return asyncio.run(run())


def past(folder: Path) -> list[dict[str, Any]]:
    entries = json.loads((folder / "replay" / "history.json").read_text())
    return [{name: entry[name] for name in entry if name != "wall_s"} for entry in entries]


def _table(columns: list[Any], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StandIn, ReplayResult]:
    folder, server = tmp_path_factory.mktemp("replay"), StandIn()
    return folder, server, play(folder, server)


def test_every_row_is_sent_once_in_order_with_nothing_but_its_inputs(
    finished: tuple[Path, StandIn, ReplayResult],
) -> None:
    _, server, result = finished
    sent = [
        row | {"id": key}
        for b in server.bodies
        for key, row in zip(b["ids"], b["rows"], strict=True)
    ]
    wanted = {row["id"]: row for row in TABLE.to_pylist()}
    assert sorted(row["id"] for row in sent) == sorted(wanted)
    for row in sent:
        assert set(row) == {"id", "at", "carrier", "distance"}
        assert datetime.fromisoformat(row["at"]) == wanted[row["id"]]["at"]
        assert row["carrier"] == wanted[row["id"]]["carrier"]
    for body in server.bodies:
        assert len({row["at"] for row in body["rows"]}) == 1  # one request for one instant
    hours = [datetime.fromisoformat(b["rows"][0]["at"]).replace(minute=0) for b in server.bodies]
    assert hours == sorted(hours)
    assert result.requests == len(server.bodies) == len(set(TABLE["at"].to_pylist()))
    assert result.rows == len(TABLE)
    assert result.failed_requests == result.unlogged_rows == 0
    assert result.p50_ms is not None
    assert result.p99_ms is not None
    assert 0 < result.p50_ms <= result.p99_ms


def test_labels_come_when_they_are_known_and_not_before(
    finished: tuple[Path, StandIn, ReplayResult],
) -> None:
    _, server, _ = finished
    wanted = {row["id"]: row for row in TABLE.to_pylist() if row["late"] is not None}
    due = {key: row for key, row in wanted.items() if row["known"] <= REPLAY.end}
    assert server.labels == {key: int(row["late"]) for key, row in due.items()}
    for key, at in server.feedback_at:
        assert wanted[key]["known"] <= at < wanted[key]["known"] + timedelta(hours=1)


def test_a_retraining_costs_its_budget_and_swaps_under_load(
    finished: tuple[Path, StandIn, ReplayResult],
) -> None:
    folder, server, result = finished
    triggers = [entry for entry in past(folder) if entry["kind"] == "trigger"]
    (ended,) = [entry for entry in past(folder) if entry["kind"] == "retraining"]
    at = datetime.fromisoformat(triggers[0]["at"])
    assert len(triggers) == 1
    assert ended["promoted"]
    assert datetime.fromisoformat(ended["at"]) == at + timedelta(hours=6)
    assert result.background_requests >= 3
    rows = Recording(folder / "replay").rows()
    expected = pc.if_else(pc.less(rows["time"], at + timedelta(hours=6)), 1, 2)
    assert rows["version"].to_pylist() == expected.to_pylist()
    # Everything up to the trigger was committed offline before the job could read it.
    assert server.pipeline.commits[server.commits_at_submission[0] - 1] == at


def test_rows_hold_scores_shadows_and_outcomes(
    finished: tuple[Path, StandIn, ReplayResult],
) -> None:
    folder, _, _ = finished
    wanted = {row["id"]: row for row in TABLE.to_pylist()}
    for row in Recording(folder / "replay").rows().to_pylist():
        truth = wanted[row["id"]]
        assert row["time"] == truth["at"]
        assert row["known_at"] == truth["known"]
        assert row["label"] == (None if truth["late"] is None else float(truth["late"]))
        assert row["score"] == pytest.approx(StandIn.score(truth, row["version"]))
        assert row["shadow_first"] == pytest.approx(StandIn.score(truth, 1))


@pytest.mark.parametrize("hours", [5, 24, 70.0, 24 * 8 + 3, 24 * 11 + 23])
def test_killed_and_continued_gives_the_same_result(
    finished: tuple[Path, StandIn, ReplayResult], tmp_path: Path, hours: float
) -> None:
    folder, _, straight = finished
    server = StandIn()
    server.pipeline.die_at = START + timedelta(hours=hours)
    with pytest.raises(KilledError):
        play(tmp_path, server)
    server.pipeline.die_at = None
    result = play(tmp_path, server)
    rows = Recording(tmp_path / "replay").rows()
    assert rows.equals(Recording(folder / "replay").rows())
    assert past(tmp_path) == past(folder)
    changing = {"folder", "wall_s", "p50_ms", "p99_ms", "background_requests"}
    assert result.model_dump(exclude=changing) == straight.model_dump(exclude=changing)


def test_killed_after_a_promotion_it_does_not_go_back_behind_it(
    finished: tuple[Path, StandIn, ReplayResult], tmp_path: Path
) -> None:
    folder, _, straight = finished
    (ended,) = [entry for entry in past(folder) if entry["kind"] == "retraining"]
    for hours in (0, 3):
        server, place = StandIn(), tmp_path / str(hours)
        server.pipeline.die_at = datetime.fromisoformat(ended["at"]) + timedelta(hours=1 + hours)
        with pytest.raises(KilledError):
            play(place, server)
        assert server.version == 2
        server.pipeline.die_at = None
        result = play(place, server)
        assert result.rows == straight.rows
        assert past(place) == past(folder)
        assert len(server.jobs) == 1


def test_killed_while_waiting_the_retraining_is_not_lost(
    finished: tuple[Path, StandIn, ReplayResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = finished[2]

    async def die(*_: Any) -> None:
        raise KilledError

    server = StandIn()
    with monkeypatch.context() as patch:
        patch.setattr(Replayer, "_await_retraining", die)
        with pytest.raises(KilledError):
            play(tmp_path, server)
    server.background = 3  # the job goes on and promotes, without anyone to see it
    result = play(tmp_path, server)
    (ended,) = [entry for entry in past(tmp_path) if entry["kind"] == "retraining"]
    assert (ended["promoted"], ended["from_version"], ended["version"]) == (True, 1, 2)
    assert len(server.jobs) == 1
    assert result.rows == straight.rows


def test_a_finished_replay_is_not_sent_again(tmp_path: Path) -> None:
    server = StandIn()
    first = play(tmp_path, server)
    sent = len(server.bodies)
    again = play(tmp_path, server)
    assert len(server.bodies) == sent
    assert again.model_dump(exclude={"wall_s"}) == first.model_dump(exclude={"wall_s"})


def test_another_session_starts_from_the_beginning(tmp_path: Path) -> None:
    server = StandIn()
    server.pipeline.die_at = START + 3 * DAY
    with pytest.raises(KilledError):
        play(tmp_path, server)
    server.pipeline.die_at = None
    assert play(tmp_path, server, "other").rows == len(TABLE)
    assert past(tmp_path)[0]["at"] == (START + DAY).isoformat()


def test_failed_requests_are_counted_and_kept_with_their_reason(tmp_path: Path) -> None:
    server = StandIn()
    server.broken = {"f100"}
    result = play(tmp_path, server)
    assert result.failed_requests == 1
    failed = Recording(tmp_path / "replay").requests().filter(pc.field("error").is_valid())
    assert "boom" in failed["error"][0].as_py()
    assert "f100" not in Recording(tmp_path / "replay").rows()["id"].to_pylist()
    assert result.rows == len(TABLE) - failed["rows"][0].as_py()
    report = summarise(result, [])
    assert report["failures"][0]["kind"] == "predict"
    assert report["summary"]["failed_requests"] == 1


def test_traffic_keeps_to_its_period() -> None:
    part = Traffic(TABLE, ["at"], LABELS, START + DAY, START + 2 * DAY)
    requests = part.requests(START, START + 99 * DAY)
    assert part.rows == sum(len(request.ids) for request in requests)
    assert all(START + DAY <= request.time < START + 2 * DAY for request in requests)
    told = {entry["id"] for batch in part.labels(START, START + 99 * DAY) for entry in batch}
    assert told < {key for request in requests for key in request.ids}


def test_traffic_names_missing_columns() -> None:
    with pytest.raises(SchemaError, match="lacks late"):
        Traffic(TABLE.drop_columns("late"), ["at"], LABELS, START, START + DAY)
