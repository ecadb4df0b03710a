"""Kill a process that materialises a view, again and again, at random moments.

``python -m faults.kill_materialize --kills 50 --store redis``, in the folder ``tests``. A round
commits rows offline, then a process materialises them, by commit or all anew, and is ended by SIGKILL
at a random moment of the time that this takes. After each round the store must be readable, and every
entity must have a row that was committed for it, never an older one than before. In the end one
undisturbed run must leave exactly the newest row of every entity.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from features.online_samples import declare
from redis_server import RedisServer

from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import PRESENT, OnlineStore, open_online

VIEW = "plain"
AT_US = 10**12


def run(folder: Path, kills: int, url: str = "", rows: int = 30_000, seed: int = 0) -> str:
    """Do so many rounds; return what happened. ``url`` is a Redis server's, "" stands for LMDB."""
    features = declare(**({"store": "redis", "url": url} if url else {}))
    offline = OfflineStore(folder / "offline", features)
    online = open_online(features, folder / "online", "faults")
    chance = random.Random(seed)
    world = World(rows, seed)
    world.commit(offline)
    took_s = {}
    for how in ("full", "changes"):
        world.commit(offline)
        process, began = _start(folder, url, how), time.monotonic()
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        took_s[how] = time.monotonic() - began
        process.wait(30)
    killed = 0
    before = world.check(online, np.full(rows, -1))
    for number in range(kills):
        world.commit(offline)
        how = ("full", "changes")[number % 2]
        process = _start(folder, url, how)
        time.sleep(chance.random() * took_s[how])
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert process.stdout is not None
        killed += process.stdout.read() == ""
        before = world.check(online, before)
    materialize_view(offline, online, VIEW)
    world.check_newest(online)
    assert materialize_view(offline, online, VIEW) == 0
    return f"{kills} rounds, {killed} killed at work; {world.moment} commits, {rows} entities"


class World:
    """Entities with rows that become more; ``created`` of a row names its commit."""

    def __init__(self, entities: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._entities = entities
        self.moment = 0
        self._events = np.full(entities, -1)
        self._created = np.full(entities, -1)
        self._known: set[tuple[int, int, int]] = set()

    def commit(self, offline: OfflineStore) -> None:
        """Commit a row for each of many entities; some happened before what is known of them."""
        self.moment += 1
        count = self._entities if self.moment == 1 else self._entities // 3
        shelf = self._random.choice(self._entities, count, replace=False)
        event = self._random.integers(0, 1000, count) + self.moment * 300
        newer = event >= self._events[shelf]
        self._events[shelf[newer]] = event[newer]
        self._created[shelf[newer]] = self.moment
        self._known |= {
            (a, b, self.moment) for a, b in zip(shelf.tolist(), event.tolist(), strict=True)
        }
        instant = pa.timestamp("us", tz="UTC")
        created = np.full(count, self.moment)
        rows = pa.table(
            {
                "shelf": shelf,
                "event_time": pa.array(event).cast(instant),
                "created_time": pa.array(created).cast(instant),
                "a": event.astype(float),
                "b": created.astype(float),
            }
        )
        offline.append(VIEW, rows, self.moment)

    def check(self, online: OnlineStore, before: Any) -> Any:
        """Check that each entity's row was committed and is not older than before."""
        found, statuses = self._read(online)
        there = (statuses == PRESENT).all(axis=1)
        assert (there | (before < 0)).all(), "rows are gone"
        event = np.where(there, found[:, 0], -1)
        assert (event >= before).all(), "older rows than before"
        for shelf in np.flatnonzero(there).tolist():
            row = (shelf, int(found[shelf, 0]), int(found[shelf, 1]))
            assert row in self._known, f"a row that nobody wrote: {row}"
        return event

    def check_newest(self, online: OnlineStore) -> None:
        """Check that each entity's row is the newest that was committed."""
        found, statuses = self._read(online)
        assert (statuses == PRESENT).all()
        np.testing.assert_array_equal(found[:, 0], self._events)
        np.testing.assert_array_equal(found[:, 1], self._created)

    def _read(self, online: OnlineStore) -> Any:
        asked = [np.arange(self._entities)]
        return online.read_matrix(VIEW, asked, np.full(self._entities, AT_US))


def _start(folder: Path, url: str, how: str) -> subprocess.Popen[str]:
    """Start a process that materialises; return when it begins."""
    process = subprocess.Popen(
        [sys.executable, "-m", "faults.kill_materialize", "--child", str(folder), url, how],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _child(folder: Path, url: str, how: str) -> None:
    features = declare(**({"store": "redis", "url": url} if url else {}))
    offline = OfflineStore(folder / "offline", features)
    online = open_online(features, folder / "online", "faults")
    # Modules that are imported at first use would take most of the time.
    offline.read(VIEW, columns=["shelf"])
    print("ready", flush=True)
    materialize_view(offline, online, VIEW, full=how == "full")
    print("done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--store", choices=["lmdb", "redis"], default="lmdb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3)
    given = parser.parse_args()
    if given.child:
        _child(Path(given.child[0]), given.child[1], given.child[2])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.store == "lmdb":
            print(run(folder, given.kills, seed=given.seed))
            return
        server = RedisServer(folder)
        try:
            print(run(folder, given.kills, server.url, seed=given.seed))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
