"""Ledgers under test, and what several processes do with one at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from mlops_ray.errors import LeaseError
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.database import Database
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import NewEvent, RunRecord, StepChange
from mlops_ray.metadata.schema import METADATA


@dataclass(frozen=True)
class Ledgers:
    """One ledger, opened as often as needed."""

    home: Home
    through_ray: bool

    def open(self) -> Ledger:
        if self.through_ray:
            return open_ledger(self.home)
        return Ledger(Database(self.home.ledger_url))

    def in_processes(self, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list:
        """Call ``work(home, *arguments)`` in one process each, all at once; return the results."""
        self.open().close()
        if self.through_ray:
            import ray

            task: Any = ray.remote(work).options(num_cpus=0.5)
            return ray.get([task.remote(self.home, *some) for some in arguments])
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(arguments), mp_context=context) as pool:
            calls = [pool.submit(work, self.home, *some) for some in arguments]
            return [call.result() for call in calls]


def await_writer(home: Home) -> Any:
    """Start the writer of a home, and return its actor when it answers."""
    import ray

    from mlops_ray.metadata.writer import RemoteDatabase

    actor = RemoteDatabase(home.ledger_url).actor
    ray.get(actor.pid.remote())
    return actor


def empty(home: Home) -> None:
    """Remove all rows."""
    engine = sa.create_engine(home.ledger_url, connect_args={"timeout": 30})
    with engine.begin() as connection:
        for table in METADATA.sorted_tables:
            connection.execute(table.delete())
    engine.dispose()


def run_record(run_id: str = "r1", **given: Any) -> RunRecord:
    values = {
        "run_id": run_id,
        "project": "shop",
        "workflow": "train",
        "status": "running",
        "config_digest": "c",
        "started_at": datetime.now(UTC),
        "ended_at": None,
        "owner": "host:1:2",
        "config": {"a": [1]},
        "provenance": {"commit": "abc", "seed": 0},
    }
    return RunRecord(**(values | given))


def race(home: Home, owner: str, rounds: int) -> dict[str, int]:
    """Try to take a lease in each round; return the tokens of those that were won."""
    ledger = open_ledger(home)
    won = {}
    for number in range(rounds):
        with contextlib.suppress(LeaseError):
            won[f"lease-{number}"] = ledger.acquire(f"lease-{number}", owner, 600).token
    return won


def append(home: Home, by: str, count: int) -> None:
    """Append events, each with a change of a step that all share."""
    ledger = open_ledger(home)
    for number in range(count):
        event = NewEvent(project="shop", kind="count", data={"by": by, "n": number})
        change = StepChange(run_id="r1", name=by, values={"rows": number, "status": "running"})
        ledger.apply([change, event])


def usurp(home: Home, owner: str, seconds: float) -> int:
    """Take the same lease by force again and again, and write under it; return how often."""
    ledger = open_ledger(home)
    deadline = time.monotonic() + seconds
    written = 0
    while time.monotonic() < deadline:
        try:
            lease = ledger.acquire("shared", owner, 600, dead=ledger.lease("shared"))
            for _ in range(3):
                data = {"token": lease.token}
                ledger.apply([NewEvent(project="shop", kind="fenced", data=data)], fence=lease)
                written += 1
        except LeaseError:
            pass
    return written


def follow(home: Home, expected: int) -> list[int]:
    """Read on from the last id until so many events were seen; return their ids."""
    ledger = open_ledger(home)
    deadline = time.monotonic() + 60
    seen: list[int] = []
    while len(seen) < expected and time.monotonic() < deadline:
        seen += [event.id for event in ledger.events(after=seen[-1] if seen else 0)]
    return seen


def claim(home: Home, by: str, count: int) -> list[str]:
    """Fire the same occasions as everyone else; return those that were new."""
    from mlops_ray.metadata.records import Firing

    ledger = open_ledger(home)
    fired = []
    for number in range(count):
        firing = Firing(
            key=f"nightly@{number}",
            project="shop",
            trigger="nightly",
            at=datetime.now(UTC),
            status="due",
            reason=by,
        )
        if ledger.fire(firing):
            fired.append(firing.key)
    return fired
