"""Who may run a workflow instance: one process at a time, and never one that is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from orchestration.bench import Bench
from orchestration.test_orchestration_once import Stage, answer_of, stage, wait_for

from mlops_ray.errors import LeaseError, LedgerError, WorkflowError
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Lease, NewEvent
from mlops_ray.orchestration import ownership
from mlops_ray.orchestration.ownership import Keeper, is_gone, owner_name, take

__all__ = ["stage"]

HERE = "orchestration.sample_steps"


@pytest.fixture
def ledger(home: Home) -> Ledger:
    return Ledger(home.ledger_url)


def owner_of_a_dead_process() -> str:
    code = "from mlops_ray.orchestration.ownership import owner_name; print(owner_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_process_is_known_to_be_dead_only_on_its_own_machine() -> None:
    dead = owner_of_a_dead_process()
    assert is_gone(dead)
    assert not is_gone(owner_name())
    machine, pid, start, number = owner_name().rsplit(":", 3)
    assert is_gone(f"{machine}:{pid}:{int(start) - 1}:{number}")
    assert not is_gone(dead.replace(machine, "elsewhere/abcdef"))


def test_the_lease_of_a_dead_process_is_taken_at_once(ledger: Ledger) -> None:
    held = ledger.acquire("w", owner_of_a_dead_process(), 3600)
    assert take(ledger, "w").token == held.token + 1


def test_of_two_that_find_a_dead_owner_the_slower_leaves_the_faster_alone(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.acquire("p/w/1", owner_of_a_dead_process(), 3600)
    faster: list[Lease] = []

    def gone(owner: str) -> bool:
        found = is_gone(owner)
        if found and not faster:
            monkeypatch.setattr(ownership, "is_gone", is_gone)
            faster.append(take(ledger, "p/w/1"))
        return found

    monkeypatch.setattr(ownership, "is_gone", gone)
    with pytest.raises(WorkflowError, match="is being run already"):
        take(ledger, "p/w/1")
    ledger.renew(faster[0], 15)


def test_a_living_process_keeps_its_lease_even_in_this_process(ledger: Ledger) -> None:
    take(ledger, "p/w/1")
    with pytest.raises(WorkflowError, match="p/w is being run already"):
        take(ledger, "p/w/1")


def test_a_lease_from_another_machine_is_taken_when_it_runs_out(ledger: Ledger) -> None:
    held = ledger.acquire("w", "elsewhere/abcdef:1:1:1", 1.5)
    began_s = time.monotonic()
    assert take(ledger, "w").token == held.token + 1
    assert time.monotonic() - began_s > 1.0


def test_a_lease_that_is_renewed_on_another_machine_is_left_alone(ledger: Ledger) -> None:
    held = ledger.acquire("p/w/1", "elsewhere/abcdef:1:1:1", 2.0)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.2):
            ledger.renew(held, 2.0)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(WorkflowError, match="is being run already"):
        take(ledger, "p/w/1")
    ended.set()
    thread.join()


def test_a_keeper_renews_and_tells_when_it_has_lost(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_RENEW_EVERY_S", 0.05)
    monkeypatch.setattr(ownership, "_LOOK_EVERY_S", 0.05)
    lease = ledger.acquire("w", owner_name(), 15)
    lost: list[LedgerError] = []
    looks: list[int] = []
    keeper = Keeper(ledger, lease, lost=lost.append, look=lambda: looks.append(1))
    wait_for(lambda: len(looks) > 3)
    held = ledger.lease("w")
    assert held is not None
    assert held.expires_at > lease.expires_at
    assert not lost
    ledger.acquire("w", "another", 15, dead=lease)
    wait_for(lambda: len(lost) == 1)
    assert isinstance(lost[0], LeaseError)
    keeper.close()


def test_a_ledger_that_is_away_for_long_is_a_lost_lease_for_a_moment_it_is_not(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_RENEW_EVERY_S", 0.05)
    monkeypatch.setattr(ownership, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(ownership, "LEASE_TTL_S", 1.0)
    lease = ledger.acquire("w", owner_name(), 1.0)
    failing = threading.Event()
    renew = ledger.renew

    def fail(*arguments: Any) -> Any:
        if failing.is_set():
            raise LedgerError("locked")
        return renew(*arguments)

    monkeypatch.setattr(ledger, "renew", fail)
    lost: list[LedgerError] = []
    keeper = Keeper(ledger, lease, lost=lost.append, look=lambda: None)
    failing.set()
    time.sleep(0.4)
    failing.clear()
    time.sleep(0.4)
    assert not lost
    failing.set()
    wait_for(lambda: len(lost) == 1)
    keeper.close()


def test_a_keeper_that_fails_itself_says_so(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_LOOK_EVERY_S", 0.05)
    lost: list[LedgerError] = []

    def look() -> None:
        raise KeyError("nothing of ours")

    keeper = Keeper(ledger, ledger.acquire("w", owner_name(), 15), lost=lost.append, look=look)
    wait_for(lambda: len(lost) == 1)
    assert "KeyError" in str(lost[0])
    keeper.close()


def test_of_two_drivers_at_once_one_goes_on(stage: Stage) -> None:
    steps = stage.steps(seconds=4, mode="pure", idempotent=True)
    answers = [answer_of(d) for d in [stage.start(steps), stage.start(steps)]]
    refused = [answer for answer in answers if "error" in answer]
    ran = [answer for answer in answers if answer.get("status") == "succeeded"]
    assert len(ran) == 1
    assert len(refused) == 1
    assert "is being run already" in refused[0]["text"]
    assert stage.count("slept begun") == 1


def test_the_run_of_a_driver_that_was_killed_is_taken_up_at_once(stage: Stage) -> None:
    steps = stage.steps(seconds=3, mode="effect", idempotent=True)
    first = stage.start(steps)
    wait_for(lambda: stage.count("slept begun") == 1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (left,) = stage.ledger.runs()
    assert left.status == "running"
    run = stage.run(steps)
    assert (run.run_id, run.status) == (left.run_id, "succeeded")
    (effect, _) = stage.ledger.steps(run.run_id)
    assert effect.attempt == 2


def test_a_driver_that_has_lost_its_run_stops_and_writes_nothing_more(
    bench: Bench, tmp_path: Path
) -> None:
    from mlops_ray.orchestration.spec import RunSpec

    step = {"uses": f"{HERE}.sleep", "with": {"seconds": 60}, "marks": True}
    project = bench.project(slow=step)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            bench.executor(project).run()
        except LeaseError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: bench.count("slept begun") == 1)
    instance = RunSpec.of(project, directory=bench.marks).instance
    taken = bench.ledger.acquire(instance, "another", 60, dead=bench.ledger.lease(instance))
    thread.join(60)
    assert "taken over" in str(caught[0])
    (record,) = bench.ledger.runs()
    assert record.status == "running"
    assert bench.states(record.run_id) == {"slow": "running"}
    event = NewEvent(project="tiny", kind="ours", run_id=record.run_id)
    bench.ledger.apply([event], fence=taken)
    assert bench.ledger.events(run_id=record.run_id)[-1].kind == "ours"
