"""The trigger actor as a real actor that is really killed, with real Ray jobs and real requests."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlops_ray.cli.init import write_project
from mlops_ray.cluster import trigger_actor
from mlops_ray.cluster.triggers import TriggersSpec
from mlops_ray.config.locate import open_workspace
from mlops_ray.errors import ClusterError
from mlops_ray.features.offline import OfflineStore
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Firing, RunRecord
from mlops_ray.orchestration.jobs import JobCommand, RayJobs
from mlops_ray.orchestration.load import load_project
from mlops_ray.orchestration.triggers import by_hand

PATIENCE_S = 60.0
SECRET = "MLOPS_RAY_TEST_SECRET"
SCRIPT = """
import json, os, sys, time
home = sys.argv[1]
key = os.environ["MLOPS_RAY_FIRING"]
line = json.dumps({"key": key, "reason": os.environ["MLOPS_RAY_REASON"], "argv": sys.argv[2:]})
log = os.open(os.path.join(home, "jobs.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(log, line.encode() + b"\\n")
while os.path.exists(os.path.join(home, "hold")):
    time.sleep(0.05)
"""


class FileClock:
    """The machine's clock, put forward by as many seconds as a file says."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> datetime:
        ahead_s = float(self._path.read_text()) if self._path.exists() else 0.0
        return datetime.now(UTC) + timedelta(seconds=ahead_s)


class DeadlyJobs:
    """Ray's jobs; the process dies between submitting and recording, while a file says so."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self) -> RayJobs:
        path = self._path

        class Jobs(RayJobs):
            def submit(self, submission_id: str, command: JobCommand) -> None:
                super().submit(submission_id, command)
                if path.exists():
                    path.unlink()
                    os.kill(os.getpid(), signal.SIGKILL)

        return Jobs()


class Bench:
    def __init__(self, project: Any, triggers: dict[str, Any]) -> None:
        webhook = {"port": 0, "secret": SECRET}
        document = project.model_dump(mode="json", by_alias=True)
        document |= {"triggers": triggers, "webhook": webhook}
        self.project = type(project).model_validate(document)
        self.home = Home(self.project.home)
        self.home.root.mkdir(parents=True, exist_ok=True)
        self.handle: Any = None

    @property
    def ledger(self) -> Ledger:
        return open_ledger(self.home)

    def start(self) -> dict[str, Any]:
        argv = (sys.executable, "-c", SCRIPT, str(self.home.root))
        spec = TriggersSpec(
            project=self.project, directory=str(self.home.root), command=JobCommand(argv=argv)
        )
        clock = FileClock(self.home.root / "ahead")
        jobs = DeadlyJobs(self.home.root / "deadly")
        self.handle = trigger_actor.ensure(self.home, spec, clock, jobs)
        self.wait(lambda: self.status()["acts"])
        return self.status()

    def status(self) -> dict[str, Any]:
        import ray

        status: dict[str, Any] = ray.get(self.handle.status.remote())
        return status

    def put_forward(self, seconds: float) -> None:
        path = self.home.root / "ahead"
        before = float(path.read_text()) if path.exists() else 0.0
        (self.home.root / "draft").write_text(str(before + seconds))
        os.replace(self.home.root / "draft", path)

    def firings(self) -> list[Firing]:
        return self.ledger.firings(project=self.project.name, limit=1000)[::-1]

    def states(self) -> list[str]:
        return [firing.status for firing in self.firings()]

    def jobs(self) -> list[dict[str, Any]]:
        path = self.home.root / "jobs.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait(self, condition: Callable[[], Any]) -> None:
        from ray.exceptions import RayActorError

        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                if condition():
                    return
            except RayActorError:  # it is being restarted
                pass
            assert time.monotonic() < give_up_s, (self.firings(), self.jobs())
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill the actor's process as the kernel would; return when another one runs."""
        pid = self.status()["pid"]
        os.kill(pid, signal.SIGKILL)
        self.wait(lambda: self.status()["pid"] != pid)


@pytest.fixture
def bench(
    ray_cluster: Any, tiny_project: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Bench]]:
    monkeypatch.setenv(SECRET, "a secret")

    def make(triggers: dict[str, Any]) -> Bench:
        made = Bench(tiny_project, triggers)
        made.start()
        return made

    yield make
    try:
        trigger_actor.stop("tiny")
    except ClusterError:
        return


HOURLY = {
    "workflow": "train",
    "cron": "0 * * * *",
    "catch_up": "all",
    "overlap": "allow",
    "overrides": ["until={at}"],
}


def test_a_schedule_survives_the_death_of_its_actor(bench: Callable[..., Bench]) -> None:
    made = bench({"hourly": HOURLY})
    made.put_forward(3600)
    made.wait(lambda: made.states() == ["succeeded"])
    made.kill()
    made.put_forward(7200)
    made.wait(lambda: made.states() == ["succeeded"] * 3)
    (made.home.root / "deadly").touch()  # dies between submitting and recording
    pid = made.status()["pid"]
    made.put_forward(3600)
    made.wait(lambda: made.states() == ["succeeded"] * 4)
    assert made.status()["pid"] != pid
    jobs = made.jobs()
    assert Counter(job["key"] for job in jobs) == Counter(f.key for f in made.firings())
    moments = sorted(job["argv"][1] for job in jobs)
    assert moments == [f"until={firing.at:%Y-%m-%dT%H:%M:%SZ}" for firing in made.firings()]
    assert all(job["argv"][0] == "workflow=train" for job in jobs)
    assert all(job["reason"].startswith("trigger hourly (2") for job in jobs)


def test_a_webhook_over_http_is_on_disk_when_it_is_answered(bench: Callable[..., Bench]) -> None:
    made = bench({"hook": {"workflow": "w", "webhook": True}})
    assert post(made, "d-1") == 202
    made.kill()
    made.wait(lambda: made.status()["acts"])
    assert post(made, "d-1") == 200
    made.wait(lambda: made.states() == ["succeeded"])
    (firing,) = made.firings()
    assert firing.key == "tiny/hook@d-1"
    assert firing.data["payload"] == {"ref": "refs/heads/main"}
    assert len(made.jobs()) == 1


def post(made: Bench, delivery: str, secret: bytes = b"a secret") -> int:
    body = json.dumps({"ref": "refs/heads/main"}).encode()
    signed = hmac.new(secret, body, hashlib.sha256).hexdigest()
    headers = {"X-Hub-Signature-256": f"sha256={signed}", "X-GitHub-Delivery": delivery}
    url = made.status()["url"] + "hook"
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_new_secret_counts_from_the_next_start_for_good(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench({"hook": {"workflow": "w", "webhook": True}})
    pid = made.status()["pid"]
    made.start()
    assert made.status()["pid"] == pid
    monkeypatch.setenv(SECRET, "another secret")
    made.start()
    made.kill()
    made.wait(lambda: made.status()["acts"])
    assert (post(made, "d-1"), post(made, "d-1", b"another secret")) == (401, 202)


def git(folder: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def test_a_commit_new_data_and_the_end_of_a_workflow(
    bench: Callable[..., Bench], tiny_project: Any, home: Home
) -> None:
    home.root.mkdir(parents=True)
    git(home.root, "init", "-b", "main")
    git(home.root, "commit", "--allow-empty", "-m", "one")
    made = bench(
        {
            "code": {"workflow": "a", "commit": "main"},
            "data": {"workflow": "b", "data": "facts"},
            "next": {"workflow": "c", "after": {"workflow": "first"}},
        }
    )
    made.wait(lambda: len(made.ledger.events(project="tiny", kind="trigger_declared")) == 3)
    git(home.root, "commit", "--allow-empty", "-m", "two")
    store = OfflineStore(home.offline("tiny"), tiny_project.features)
    now = datetime.now(UTC)
    columns = {"thing": ["a"], "event_time": [now], "created_time": [now], "value": [1.0]}
    schema = trigger_schema(tiny_project)
    rows = pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
    store.append("facts", rows, int(now.timestamp() * 1e6))
    record = RunRecord(
        run_id="r-1",
        project="tiny",
        workflow="first",
        status="succeeded",
        config_digest="",
        started_at=now,
        ended_at=now,
        owner="",
        config={},
        provenance={},
    )
    made.ledger.start_run(record, [])
    made.ledger.append("tiny", "run_succeeded", {}, run_id="r-1")
    made.wait(lambda: made.states() == ["succeeded"] * 3)
    marks = {f.trigger: f.key.partition("@")[2] for f in made.firings()}
    assert marks["data"] == f"{store.table_id('facts')}:{store.version('facts')}"
    assert marks["next"] == "r-1:succeeded"
    assert len(marks["code"].partition("~")[0]) == 40
    store.compact("facts")  # the same rows
    git(home.root, "commit", "--allow-empty", "-m", "three")
    made.wait(lambda: len(made.firings()) == 4)
    assert Counter(f.trigger for f in made.firings()) == {"code": 2, "data": 1, "next": 1}


def trigger_schema(project: Any) -> pa.Schema:
    from mlops_ray.features.definitions import define

    return define(project.features, "facts").schema


FLAKY = """
import os
from mlops_ray.orchestration.context import Context

def count(context: Context, seed: int) -> int:
    with open(os.path.join(context.home.root, "counted"), "a") as file:
        file.write("x")
    return seed

def flaky(context: Context, number: int) -> int:
    marker = os.path.join(context.home.root, "failed")
    if not os.path.exists(marker):
        open(marker, "w").close()
        raise RuntimeError("not yet")
    return number
"""
TWO_STEPS = """
name: two_steps
steps:
  count: {uses: shop.flaky.count, with: {seed: "${seed}"}}
  flaky: {uses: shop.flaky.flaky, with: {number: $count}, mode: effect}
"""


def test_a_real_run_that_fails_goes_on_in_the_next_attempt(
    ray_cluster: Any, tmp_path: Path, home: Home
) -> None:
    write_project(tmp_path / "shop", "shop", "shop")
    (tmp_path / "shop" / "shop" / "flaky.py").write_text(FLAKY)
    workflow = tmp_path / "shop" / "configs" / "workflow" / "two_steps.yaml"
    workflow.parent.mkdir()
    workflow.write_text(TWO_STEPS)
    trigger = "{workflow: two_steps, overrides: ['seed=5'], retries: 1, backoff: {first: 1s}}"
    overrides = [f"home={home.root}", f"+triggers.button={trigger}"]
    workspace = open_workspace(tmp_path / "shop")
    project = load_project(workspace, overrides)
    spec = trigger_actor.spec_of(workspace, project, overrides)
    trigger_actor.ensure(home, spec)
    ledger = open_ledger(home)
    try:
        fired = by_hand("shop", "button", "ann")
        ledger.fire(fired)
        give_up_s = time.monotonic() + 2 * PATIENCE_S
        while (firing := ledger.firings(key=fired.key)[0]).status in ("due", "submitted"):
            assert time.monotonic() < give_up_s, firing
            time.sleep(0.2)
    finally:
        trigger_actor.stop("shop")
    assert (firing.status, firing.attempt) == ("succeeded", 2), firing
    assert "not yet" in firing.data["log"]
    (run,) = ledger.runs(project="shop")
    assert (run.status, run.reason) == ("succeeded", "trigger button (by hand, ann)")
    assert (home.root / "counted").read_text() == "x"
    told = ledger.events(run_id=run.run_id, kind="triggered")
    assert {event.data["firing"] for event in told} == {fired.key}


def test_overlap(bench: Callable[..., Bench]) -> None:
    triggers = {
        "skip": {"workflow": "a", "overlap": "skip"},
        "queue": {"workflow": "b", "overlap": "queue"},
        "cancel": {"workflow": "c", "overlap": "cancel"},
    }
    made = bench(triggers)
    (made.home.root / "hold").touch()
    for name in triggers:
        made.ledger.fire(by_hand("tiny", name, "1"))
    made.wait(lambda: len(made.jobs()) == 3)
    for name in triggers:
        made.ledger.fire(by_hand("tiny", name, "2"))
    made.wait(lambda: len(made.jobs()) == 4)  # the one that was cancelled has a successor
    (made.home.root / "hold").unlink()
    made.wait(lambda: Counter(made.states())["succeeded"] == 4)
    ended = {(f.trigger, f.reason[-1] == "1"): f.status for f in made.firings()}
    assert ended == {
        ("skip", True): "succeeded",
        ("skip", False): "skipped",
        ("queue", True): "succeeded",
        ("queue", False): "succeeded",
        ("cancel", True): "cancelled",
        ("cancel", False): "succeeded",
    }


def test_what_was_told_last_counts_after_a_death(bench: Callable[..., Bench]) -> None:
    made = bench({"old": {"workflow": "w"}})
    changed = made.project.model_dump(mode="json", by_alias=True)
    changed["triggers"] = {"new": {"workflow": "w"}}
    made.project = type(made.project).model_validate(changed)
    made.start()
    made.kill()
    made.ledger.fire(by_hand("tiny", "old", ""))
    made.ledger.fire(by_hand("tiny", "new", ""))
    made.wait(lambda: sorted(made.states()) == ["skipped", "succeeded"])
    trigger_actor.stop("tiny")
    with pytest.raises(ClusterError, match="no triggers run"):
        trigger_actor.find("tiny")
