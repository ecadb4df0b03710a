"""Triggers at work without Ray: real ledger, pretended jobs, a clock that is moved by hand."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mlops_ray.cluster.cursors import PAUSED, RESUMED
from mlops_ray.cluster.observations import ProjectWorld
from mlops_ray.cluster.triggers import Dispatcher, TriggersSpec
from mlops_ray.errors import ClusterError, FeatureStoreError, JobRefusedError
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import RunRecord
from mlops_ray.orchestration.jobs import JobCommand, JobOutcome
from mlops_ray.orchestration.triggers import by_hand

ALLOW = {"overlap": "allow", "overrides": ["until={at}"]}
HOUR = timedelta(hours=1)


class Crash(BaseException):
    """The process dies here."""


class Cluster:
    """Jobs that end when the test says so; survives the dispatchers."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.commands: dict[str, JobCommand] = {}
        self.known: dict[str, JobOutcome] = {}
        self.down = False
        self.refuses = ""

    def submit(self, submission_id: str, command: JobCommand) -> None:
        if self.down:
            raise ClusterError("no dashboard")
        if self.refuses and self.refuses in submission_id:
            raise JobRefusedError("not this one")
        if submission_id not in self.known:
            self.submitted.append(submission_id)
            self.commands[submission_id] = command
            self.known[submission_id] = JobOutcome(status="running")

    def outcomes(self, submission_ids: Iterable[str]) -> dict[str, JobOutcome]:
        if self.down:
            raise ClusterError("no dashboard")
        return {i: self.known.get(i, JobOutcome(status="lost")) for i in submission_ids}

    def stop(self, submission_id: str) -> None:
        self.end(submission_id, status="failed", message="stopped")

    def end(self, submission_id: str, **outcome: Any) -> None:
        self.known[submission_id] = JobOutcome(**outcome)

    def end_all(self, status: str = "succeeded") -> None:
        for name, outcome in self.known.items():
            if outcome.status == "running":
                self.end(name, status=status)


class World:
    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.heads: dict[str, str] = {}

    def version(self, view: str, seen: str) -> str:
        if view not in self.versions:
            raise FeatureStoreError("the table cannot be read")
        return self.versions[view]

    def head(self, branch: str) -> str:
        return self.heads[branch]


class Mortal:
    """What it stands for, until the nth call: then the process dies, before or after the call."""

    def __init__(self, real: Any, calls: tuple[str, ...], dies: Countdown) -> None:
        self._real, self._calls, self._dies = real, calls, dies

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name not in self._calls:
            return found

        def call(*args: Any, **options: Any) -> Any:
            self._dies.count()
            result = found(*args, **options)
            self._dies.count()
            return result

        return call


class Countdown:
    def __init__(self, left: int) -> None:
        self.left = left

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Crash


WRITES = ("fire", "update_firing", "apply", "acquire", "renew", "append")


class Bench:
    """A dispatcher that can die: ``restart`` makes a new one of what the ledger says."""

    def __init__(self, project: Any, triggers: dict[str, Any]) -> None:
        document = project.model_dump(mode="json", by_alias=True) | {"triggers": triggers}
        self.project = type(project).model_validate(document)
        self.ledger = Ledger(Home(self.project.home).ledger_url)
        self.jobs, self.world = Cluster(), World()
        self.now = datetime.now(UTC)
        self.owner = "one"
        self.restart()

    def restart(self, dies: int | None = None) -> None:
        countdown = Countdown(dies or 0)
        spec = TriggersSpec(
            project=self.project, directory="/", command=JobCommand(argv=("mlops-ray", "run"))
        )
        self.dispatcher = Dispatcher(
            spec,
            Mortal(self.ledger, WRITES, countdown),  # type: ignore[arg-type]
            Mortal(self.jobs, ("submit", "stop"), countdown),  # type: ignore[arg-type]
            self.world,
            owner=self.owner,
            clock=lambda: self.now,
        )

    def tick(self, **moved: float) -> bool:
        self.now += timedelta(**moved)
        self.dispatcher._looked_s = float("-inf")  # do not wait for the next look outside
        return self.dispatcher.tick()

    def live(self, ticks: int) -> int:
        """Tick, also beyond a death; return how often it died."""
        deaths = 0
        for _ in range(ticks):
            try:
                self.tick()
            except Crash:
                deaths += 1
                self.restart()
        return deaths

    def states(self) -> list[tuple[str, str]]:
        firings = self.ledger.firings(project="tiny")
        return [(f.trigger, f.status) for f in reversed(firings)]

    def run(self, workflow: str, status: str, run_id: str) -> None:
        record = RunRecord(
            run_id=run_id,
            project="tiny",
            workflow=workflow,
            status=status,  # type: ignore[arg-type]
            config_digest="",
            started_at=self.now,
            ended_at=self.now,
            owner="",
            config={},
            provenance={},
        )
        self.ledger.start_run(record, [])
        self.ledger.append("tiny", f"run_{status}", {}, run_id=run_id)


HOURLY = {"workflow": "train", "cron": "0 * * * *"}


def test_a_schedule_fires_once_each_time_and_catches_up_after_a_break(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"hourly": HOURLY})
    assert bench.tick()
    assert bench.states() == []
    for _ in range(3):
        bench.tick(hours=1)
        bench.tick(seconds=1)
        bench.jobs.end_all()
    bench.tick(seconds=1)
    assert bench.states() == [("hourly", "succeeded")] * 3
    bench.restart()
    bench.tick(hours=10)
    bench.tick(seconds=1)
    assert len(bench.jobs.submitted) == 4
    (newest, *_) = bench.ledger.firings(project="tiny")
    assert newest.data["earlier_ones_missed"] is True
    command = bench.jobs.commands[bench.jobs.submitted[-1]]
    assert command.argv == ("mlops-ray", "run", "workflow=train", "--fresh")
    assert command.env["MLOPS_RAY_FIRING"] == newest.key
    assert command.env["MLOPS_RAY_REASON"].startswith("trigger hourly (2")


def test_a_crash_at_any_moment_loses_nothing_and_doubles_nothing(tiny_project: Any) -> None:
    """Two occasions, one job that fails first; the process dies at every possible write in turn."""
    crashes = 0
    for moment in range(1, 200):
        project = tiny_project.model_copy(
            update={"home": tiny_project.home / str(moment)},
        )
        bench = Bench(
            project,
            {
                "hourly": HOURLY | {"retries": 1, "overlap": "queue", "backoff": {"first": 0}},
                "data": {"workflow": "train", "data": "facts", "retries": 1},
            },
        )
        bench.world.versions["facts"] = "t:1"
        # One full hour lies in the script, whenever the test runs.
        bench.now = bench.now.replace(minute=5, second=0, microsecond=0)
        bench.restart(dies=moment)
        script = [("tick", 0), ("tick", 3600), ("version", 0), ("fail", 0), ("tick", 1)]
        script += [("tick", 40), ("end", 0), ("tick", 1)]
        for deed, seconds in script:
            if deed == "version":
                bench.world.versions["facts"] = "t:2"
            elif deed in ("fail", "end"):
                bench.jobs.end_all("failed" if deed == "fail" else "succeeded")
            else:
                bench.now += timedelta(seconds=seconds)
                crashes += bench.live(2)
        for _ in range(4):
            bench.now += timedelta(minutes=2)
            crashes += bench.live(1)
            bench.jobs.end_all()
        expected = Counter({("hourly", "succeeded"): 1, ("data", "succeeded"): 1})
        assert Counter(bench.states()) == expected, moment
        attempts = Counter(job.rpartition("-")[0] for job in bench.jobs.submitted)
        failed = sum(count - 1 for count in attempts.values())
        assert (len(attempts), failed) == (2, 1), moment
        if crashes < moment:
            break
    assert crashes > 20


def test_only_one_of_two_dispatchers_acts(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"hourly": HOURLY})
    assert bench.tick()
    first = bench.dispatcher
    bench.owner = "two"
    bench.restart()
    assert not bench.tick(hours=1)
    assert bench.states() == []
    first.close()
    assert bench.tick()
    assert not first.tick()
    assert len(bench.jobs.submitted) == 1


def test_one_that_lost_its_lease_writes_nothing_more(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"hourly": HOURLY})
    bench.tick()
    paused = bench.dispatcher
    bench.ledger.acquire("triggers/tiny", "two", 60, dead=bench.ledger.lease("triggers/tiny"))
    bench.now += HOUR
    assert not paused.tick()
    assert not paused.tick()
    assert bench.states() == []
    assert bench.jobs.submitted == []
    with pytest.raises(ClusterError, match="another process"):
        paused.deliver("hourly", "1", None, {})


def test_new_data_and_new_commits(tiny_project: Any) -> None:
    triggers = {
        "data": {"workflow": "train", "data": "facts"},
        "code": {"workflow": "train", "commit": "main", **ALLOW},
    }
    bench = Bench(tiny_project, triggers)
    bench.world.heads["main"] = "c1"
    bench.tick()
    assert "data" in bench.dispatcher.status()["troubles"]  # the table cannot be read yet
    bench.world.versions["facts"] = "t:3"
    bench.tick()
    assert bench.dispatcher.status()["troubles"] == {}
    assert bench.states() == []
    bench.world.versions["facts"], bench.world.heads["main"] = "t:5", "c2"
    bench.tick()
    bench.tick()
    assert sorted(bench.states()) == [("code", "submitted"), ("data", "submitted")]
    bench.restart()
    bench.world.versions["facts"] = "t:6"  # queued behind the first
    bench.tick(minutes=1)
    assert bench.states()[-1] == ("data", "due")
    keys = [firing.key for firing in bench.ledger.firings(project="tiny", trigger="data")]
    assert keys == ["tiny/data@t:6", "tiny/data@t:5"]
    bench.jobs.end_all()
    bench.tick(seconds=1)
    assert bench.states()[-1] == ("data", "submitted")


def test_the_end_of_another_workflow(tiny_project: Any) -> None:
    triggers = {
        "good": {"workflow": "b", "after": {"workflow": "a"}, **ALLOW},
        "any": {"workflow": "c", "after": {"workflow": "a", "status": "any"}, **ALLOW},
    }
    bench = Bench(tiny_project, triggers)
    bench.run("a", "succeeded", "before")
    bench.tick()
    bench.run("a", "succeeded", "r1")
    bench.run("b", "succeeded", "r2")
    bench.run("a", "failed", "r3")
    bench.tick()
    bench.restart()
    bench.tick()
    keys = sorted(firing.key for firing in bench.ledger.firings(project="tiny"))
    assert keys == [
        "tiny/any@r1:succeeded",
        "tiny/any@r3:failed",
        "tiny/good@r1:succeeded",
    ]


def measured(psi: dict[str, float], auc: float, run_id: str | None = None) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(),
        "action": "wait",
        "reason": "",
        "session": run_id or "",
        "version": 1,
        "drift": {"rows": 1000, "psi": psi},
        "performance": {"rows": 1000, "auc": auc, "reference_auc": 0.8},
    }


def test_drift_and_performance_that_the_monitor_measured(tiny_project: Any) -> None:
    triggers = {
        "drift": {"workflow": "retrain", "drift": {"min_features": 2}, **ALLOW},
        "sensitive": {"workflow": "retrain", "drift": {"threshold": 0.1, "min_features": 1}},
        "worse": {"workflow": "retrain", "performance": True},
    }
    bench = Bench(tiny_project, triggers)
    bench.tick()
    bench.ledger.append("tiny", "measured", measured({"x": 0.15, "y": 0.01}, 0.8))
    bench.tick()
    assert [name for name, _ in bench.states()] == ["sensitive"]
    bench.jobs.end_all()
    replay = measured({"x": 9, "y": 9}, 0.1, "run-1")
    bench.ledger.append("tiny", "measured", replay, run_id="run-1", step="monitor")
    bench.tick()
    assert len(bench.states()) == 1
    bench.ledger.append("tiny", "measured", measured({"x": 0.3, "y": 0.4}, 0.7))
    bench.tick()
    fired = {f.trigger: f.reason for f in bench.ledger.firings(project="tiny")[:3]}
    assert set(fired) == {"drift", "sensitive", "worse"}
    assert fired["drift"].startswith("drift: PSI")
    assert fired["worse"].startswith("AUC 0.700")


def test_triggers_that_run_the_same_wait_for_each_other(tiny_project: Any) -> None:
    same = {"workflow": "w", "event": "e"}
    bench = Bench(tiny_project, {"a": same, "b": same, "c": same | {"overrides": ["seed=2"]}})
    bench.tick()
    bench.ledger.append("tiny", "e", {})
    bench.tick()
    assert Counter(status for _, status in bench.states()) == {"submitted": 2, "due": 1}
    bench.jobs.end_all()
    bench.tick(seconds=1)
    assert Counter(status for _, status in bench.states()) == {"succeeded": 2, "submitted": 1}


def test_events_of_any_kind(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"parity": {"workflow": "w", "event": "parity"}})
    bench.ledger.append("tiny", "parity", {"breached": False})
    bench.tick()
    bench.ledger.append("tiny", "parity", {"breached": True})
    bench.tick()
    (firing,) = bench.ledger.firings(project="tiny")
    assert firing.data["event"] == {"breached": True}


def test_a_failed_job_is_tried_again_and_goes_on_where_it_was(tiny_project: Any) -> None:
    declared = {"workflow": "w", "event": "e", "retries": 1}
    declared["backoff"] = {"first": "1m", "jitter": 0}
    bench = Bench(tiny_project, {"t": declared})
    bench.tick()
    bench.ledger.append("tiny", "e", {})
    bench.tick()
    bench.jobs.end_all("failed")
    bench.tick(seconds=1)
    bench.tick(seconds=50)
    assert len(bench.jobs.submitted) == 1
    bench.tick(seconds=11)
    first, second = bench.jobs.submitted
    assert (first[-2:], second[-2:]) == ("-1", "-2")
    assert "--fresh" not in bench.jobs.commands[second].argv
    bench.jobs.end(second, status="failed", message="exit code 1", log="the end of the log")
    bench.tick(seconds=1)
    (firing,) = bench.ledger.firings(project="tiny")
    assert (firing.status, firing.attempt) == ("failed", 2)
    assert firing.data["message"] == "exit code 1"
    kinds = [e.kind for e in bench.ledger.events(project="tiny") if e.kind.startswith("firing")]
    assert kinds == [
        "firing_due",
        "firing_submitted",
        "firing_due",
        "firing_submitted",
        "firing_failed",
    ]


def test_a_cluster_that_is_down_is_asked_again(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"hourly": HOURLY})
    bench.tick()
    bench.jobs.down = True
    bench.tick(hours=1)
    bench.tick(seconds=1)
    assert bench.states() == [("hourly", "due")]
    assert "no dashboard" in bench.dispatcher.status()["troubles"]["hourly"]
    bench.jobs.down = False
    bench.tick(seconds=1)
    assert bench.states() == [("hourly", "submitted")]
    assert bench.jobs.submitted[0].endswith("-1")
    bench.jobs.known.clear()  # the head was started anew, without a memory
    bench.tick(seconds=1)
    bench.tick(seconds=1)
    assert [job[-2:] for job in bench.jobs.submitted] == ["-1", "-2"]


def test_a_lost_job_whose_run_succeeded_is_not_run_again(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"t": {"workflow": "train"}})
    bench.tick()
    for number, status in enumerate(("succeeded", "failed")):
        firing = by_hand("tiny", "t", "")
        bench.ledger.fire(firing)
        bench.tick(seconds=1)
        bench.run("train", status, f"r{number}")
        bench.ledger.append("tiny", "triggered", {"firing": firing.key}, run_id=f"r{number}")
        bench.jobs.known.clear()  # the head was started anew, without a memory
        for _ in range(2):
            bench.tick(seconds=1)
    assert [job[-2:] for job in bench.jobs.submitted] == ["-1", "-1", "-2"]
    assert Counter(bench.states()) == {("t", "succeeded"): 1, ("t", "submitted"): 1}


def test_a_job_that_is_refused_is_given_up_and_blocks_nothing(tiny_project: Any) -> None:
    same = {"workflow": "w", "event": "e"}
    bench = Bench(tiny_project, {"bad": same, "good": same})
    bench.tick()
    bench.jobs.refuses = "-bad-"
    bench.ledger.append("tiny", "e", {})
    bench.tick()
    assert "not this one" in bench.dispatcher.status()["troubles"]["bad"]
    assert sorted(bench.states()) == [("bad", "due"), ("good", "due")]
    for _ in range(2):
        bench.tick(hours=1)
    bench.jobs.refuses = ""
    bench.tick(hours=1)
    (job,) = bench.jobs.submitted  # the same attempt, so it begins anew
    assert job.endswith("-1")
    assert "--fresh" in bench.jobs.commands[job].argv
    bench.jobs.end_all()
    bench.tick(seconds=1)
    bench.jobs.end_all()
    bench.jobs.refuses = "-bad-"
    bench.ledger.append("tiny", "e", {})
    for _ in range(5):
        bench.tick(hours=1)
    firings = bench.ledger.firings(project="tiny", trigger="bad")
    assert [firing.status for firing in firings] == ["failed", "succeeded"]
    assert ("good", "submitted") in bench.states()


def test_what_goes_wrong_with_one_trigger_stops_no_other(tiny_project: Any) -> None:
    triggers = {
        "code": {"workflow": "a", "commit": "main"},
        "drift": {"workflow": "b", "drift": True},
        "hourly": HOURLY,
    }
    bench = Bench(tiny_project, triggers)
    bench.world.heads["main"] = "c1"
    bench.tick()
    bench.world.heads.clear()
    bench.ledger.append("tiny", "measured", {"drift": "of another time"})
    bench.tick(hours=1)
    assert bench.states() == [("hourly", "submitted")]
    troubles = bench.dispatcher.status()["troubles"]
    assert troubles["code"] == "KeyError: 'main'"
    assert "cannot be read" in troubles["drift"]
    bench.ledger.append("tiny", "measured", measured({f"f{n}": 9.0 for n in range(9)}, 0.8))
    bench.tick(seconds=1)
    assert ("drift", "submitted") in bench.states()


def test_the_interval_since_the_last_start_outlives_many_firings(tiny_project: Any) -> None:
    declared = {"workflow": "w", "event": "e", "min_interval": "7d"}
    bench = Bench(tiny_project, {"t": declared})
    bench.tick()
    bench.ledger.append("tiny", "e", {})
    bench.tick(minutes=1)
    assert len(bench.jobs.submitted) == 1
    for number in range(110):
        firing = by_hand("tiny", "t", "").model_copy(update={"at": bench.now})
        left = {"key": f"tiny/t@old-{number}", "status": "skipped", "attempt": 0}
        bench.ledger.fire(firing.model_copy(update=left))
    bench.jobs.end_all()
    bench.ledger.append("tiny", "e", {})
    bench.tick(hours=1)
    assert len(bench.jobs.submitted) == 1
    bench.tick(days=7)
    assert len(bench.jobs.submitted) == 2


def test_a_branch_that_comes_back_and_a_table_that_is_gone(tiny_project: Any) -> None:
    triggers = {
        "code": {"workflow": "a", "commit": "main"},
        "data": {"workflow": "b", "data": "facts"},
    }
    bench = Bench(tiny_project, triggers)
    bench.world.heads["main"], bench.world.versions["facts"] = "A", "t:3"
    bench.tick()
    bench.world.versions["facts"] = ""
    for head in "BAB":
        bench.world.heads["main"] = head
        bench.tick(minutes=1)
        bench.restart()
        bench.tick(seconds=1)
    assert Counter(name for name, _ in bench.states()) == {"code": 3}


def test_a_firing_and_its_event_are_written_together(tiny_project: Any) -> None:
    for moment in range(1, 13):
        project = tiny_project.model_copy(update={"home": tiny_project.home / str(moment)})
        bench = Bench(project, {"t": {"workflow": "w", "event": "e"}})
        bench.tick()
        bench.ledger.append("tiny", "e", {})
        bench.restart(dies=moment)
        bench.live(4)
        bench.jobs.end_all()
        bench.live(2)
        events = bench.ledger.events(project="tiny")
        kinds = [event.kind for event in events if event.kind.startswith("firing")]
        assert kinds == ["firing_due", "firing_submitted", "firing_succeeded"], moment


def test_cancel_replaces_what_runs_when_it_has_ended(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"t": {"workflow": "w", "event": "e", "overlap": "cancel"}})
    bench.tick()
    for _ in range(2):
        bench.ledger.append("tiny", "e", {})
        bench.tick(seconds=1)
    assert bench.states() == [("t", "submitted"), ("t", "due")]
    bench.tick(seconds=1)
    bench.tick(seconds=1)
    assert bench.states() == [("t", "cancelled"), ("t", "submitted")]


def test_pause_and_resume_and_by_hand(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"hourly": HOURLY})
    bench.tick()
    bench.ledger.append("tiny", PAUSED, {"trigger": "hourly"})
    bench.tick(hours=1)
    bench.restart()
    bench.tick(hours=1)
    assert bench.states() == [("hourly", "skipped")] * 2
    bench.ledger.fire(by_hand("tiny", "hourly", "ann"))
    bench.tick(seconds=1)
    assert ("hourly", "submitted") in bench.states()
    bench.jobs.end_all()
    bench.ledger.append("tiny", RESUMED, {"trigger": "hourly"})
    bench.tick(hours=1)
    assert Counter(bench.states())[("hourly", "submitted")] == 1


def test_a_trigger_that_is_declared_anew_begins_now(tiny_project: Any) -> None:
    bench = Bench(tiny_project, {"t": HOURLY | {"paused": True}})
    bench.tick()
    bench.tick(hours=1)
    assert bench.states() == [("t", "skipped")]
    bench.ledger.fire(by_hand("tiny", "gone", ""))
    hourly = {"t": HOURLY}
    again = Bench(tiny_project, hourly)
    again.now = datetime.now(UTC)
    again.tick()
    assert sorted(again.states()) == [("gone", "skipped"), ("t", "skipped")]
    again.tick(hours=2)
    assert ("t", "submitted") in again.states()


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_head_of_a_real_branch(tiny_project: Any, tmp_path: Path) -> None:
    world = ProjectWorld(tiny_project.features, tmp_path / "offline", tmp_path)
    git(tmp_path, "init", "-b", "main")
    git(tmp_path, "commit", "--allow-empty", "-m", "one")
    first = world.head("main")
    assert first == git(tmp_path, "rev-parse", "HEAD")
    git(tmp_path, "checkout", "-b", "other")
    git(tmp_path, "commit", "--allow-empty", "-m", "two")
    assert world.head("main") == first
    assert world.head("other") != first
    with pytest.raises(Exception, match="unknown"):
        world.head("nowhere")
