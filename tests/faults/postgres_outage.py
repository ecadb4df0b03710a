"""PostgreSQL goes and comes back, and its connections are cut: nothing is lost, nothing doubled.

``python -m faults.postgres_outage --outages 20 --cuts 200``, in ``tests`` with ``PYTHONPATH=..``
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import Counter

from postgres_server import PostgresServer, serve

from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import NewEvent, StepChange


class Client:
    """A thread that writes and reads, and remembers what was acknowledged."""

    def __init__(self, url: str, name: str) -> None:
        self._ledger = Ledger(url)
        self._name = name
        self._stopped = threading.Event()
        self.acknowledged: list[int] = []
        self.tokens: list[int] = []
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        if self.errors:
            raise self.errors[0]

    def _work(self) -> None:
        number = 0
        try:
            while not self._stopped.is_set():
                self._write(number)
                number += 1
        except BaseException as error:
            self.errors.append(error)

    def _write(self, number: int) -> None:
        event = NewEvent(project="shop", kind="count", data={"by": self._name, "n": number})
        change = StepChange(run_id="r1", name=self._name, values={"rows": number})
        self._ledger.apply([event, change])
        self.acknowledged.append(number)
        if number % 10 == 0:
            self.tokens.append(self._ledger.acquire(self._name, "me", 600).token)
            assert self._ledger.steps("r1")


def run(server: PostgresServer, outages: int, cuts: int, *, clients: int = 4, seed: int = 0) -> int:
    """Stop and start the server, and cut connections, at random; return the events written."""
    url = server.new_database()
    Ledger(url).close()
    chance = random.Random(seed)
    writing = [Client(url, f"client-{number}") for number in range(clients)]
    for _ in range(cuts):
        time.sleep(chance.uniform(0.01, 0.1))
        _cut(url)
    for number in range(outages):
        time.sleep(chance.uniform(0.05, 0.3))
        server.stop(hard=number % 2 == 0)
        time.sleep(chance.uniform(0, 0.5))
        server.start()
    time.sleep(0.2)
    for client in writing:
        client.stop()
    return _check(url, writing)


def _cut(url: str) -> None:
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def _check(url: str, clients: list[Client]) -> int:
    ledger = Ledger(url)
    events = ledger.events(kind="count")
    for number, client in enumerate(clients):
        found = [event.data["n"] for event in events if event.data["by"] == f"client-{number}"]
        doubled = [n for n, times in Counter(found).items() if times > 1]
        assert not doubled, f"client {number}: doubled {doubled}"
        assert found == client.acknowledged, f"client {number}: lost or out of order"
        assert client.tokens == list(range(1, len(client.tokens) + 1)), client.tokens
    ledger.close()
    return len(events)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--outages", type=int, default=20)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for server in serve():
        count = run(server, given.outages, given.cuts, seed=given.seed)
        print(f"{given.outages} outages, {given.cuts} cuts, {count} events: all there")


if __name__ == "__main__":
    main()
