"""The ledger's writer is killed while many write: nothing acknowledged is lost, nothing doubled.

Half of the clients have its file at hand and go on by themselves; the others wait for it.

``python -m faults.kill_ledger --kills 30``, in ``tests`` with ``PYTHONPATH=..``
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mlops_ray.cluster.connect import prepare_environment
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.ledger import Ledger


class Client:
    """A thread that appends events and counts in a lease, and remembers what was acknowledged."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self.error: BaseException | None = None
        self._stopped = threading.Event()
        self.acknowledged: list[int] = []
        self.tokens: list[int] = []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        try:
            number = 0
            while not self._stopped.is_set():
                self._write(number)
                number += 1
        except BaseException as error:
            self.error = error

    def _write(self, number: int) -> None:
        self._ledger.append("shop", "count", {"by": self._name, "n": number})
        self.acknowledged.append(number)
        if number % 10 == 9:
            self.tokens.append(self._ledger.acquire(self._name, "me", 600).token)


def run(home: Home, kills: int, *, clients: int = 8, seed: int = 0) -> int:
    """Kill the writer so many times at random moments; check the ledger; return the events."""
    import ray

    from mlops_ray.metadata.writer import RemoteDatabase

    class Far(RemoteDatabase):
        """A process on another node, which cannot write itself while the writer is away."""

        def _place(self) -> tuple[str, int]:
            return "another node", 1

    chance = random.Random(seed)
    actor = RemoteDatabase(home.ledger_url).actor
    ray.get(actor.pid.remote())
    kinds = [RemoteDatabase, Far]
    ledgers = [Ledger(kinds[number % 2](home.ledger_url)) for number in range(clients)]
    writing = [Client(ledger, f"client-{number}") for number, ledger in enumerate(ledgers)]
    for _ in range(kills):
        time.sleep(chance.uniform(0.02, 0.4))
        kill(actor)
    time.sleep(0.2)
    for client in writing:
        client.stop()
    return _check(home, writing)


def kill(actor: Any) -> None:
    """Send SIGKILL to the writer's process, once it answers."""
    import ray

    while True:
        with contextlib.suppress(ray.exceptions.RayActorError):
            os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
            return
        time.sleep(0.02)


def _check(home: Home, clients: list[Client]) -> int:
    # Read directly: what is on the disk counts.
    ledger = Ledger(home.ledger_url)
    events = ledger.events(kind="count")
    for number, client in enumerate(clients):
        name = f"client-{number}"
        found = [event.data["n"] for event in events if event.data["by"] == name]
        doubled = [n for n, times in Counter(found).items() if times > 1]
        assert not doubled, f"{name}: doubled {doubled}"
        assert found == client.acknowledged, f"{name}: lost or out of order"
        assert client.tokens == list(range(1, len(client.tokens) + 1)), f"{name}: {client.tokens}"
    ledger.close()
    return len(events)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    prepare_environment()
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        count = run(Home(Path(folder) / "home", Storage()), given.kills, seed=given.seed)
        print(f"{given.kills} kills, {count} events, {time.monotonic() - started:.0f} s: all there")


if __name__ == "__main__":
    main()
