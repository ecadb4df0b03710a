"""Take a Redis server away for a while, under reads and writes.

``python -m faults.redis_outage --seconds 10``, in the folder ``tests``. Threads write rows and read
them back. Meanwhile the server hangs (SIGSTOP), is killed (SIGKILL) and is shut down, for so many
seconds each. Every call must end in time, with an answer or a ``FeatureStoreError``; reads that may do
without a server say NOT_FOUND; after each outage all go on without a restart; and in the end each
acknowledged write is there.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from features.online_samples import declare, table
from redis_server import RedisServer

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.online import NOT_FOUND, PRESENT, open_online

WRITERS, SHELVES = 3, 40
TIMEOUT_S = 0.5
AT_US = 10**12


class Outage:
    """The threads and what they saw."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._stop = threading.Event()
        self.acknowledged: dict[int, int] = {}
        self.seen: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.problems: list[str] = []

    def write(self, number: int) -> None:
        """Write ever newer rows; remember those that were acknowledged."""
        features = declare(store="redis", url=self._server.url, timeout=f"{TIMEOUT_S}s")
        store = open_online(features, Path("unused"), "outage")
        moment = 0
        while not self._stop.is_set():
            moment += 1
            shelf = number * SHELVES + moment % SHELVES
            row = {"shelf": shelf, "event_time": moment, "created_time": moment}
            try:
                with self._timed("write"):
                    store.write("plain", table(features, "plain", [row | {"a": float(moment)}]))
            except FeatureStoreError:
                continue
            self.acknowledged[shelf] = moment
            time.sleep(0.001)

    def read(self, on_failure: str) -> None:
        """Read rows; an acknowledged one must not be gone or older."""
        features = declare(
            store="redis", url=self._server.url, timeout=f"{TIMEOUT_S}s", on_failure=on_failure
        )
        reader = open_online(features, Path("unused"), "outage", readonly=True).reader(["plain"])
        shelves = np.arange(WRITERS * SHELVES)
        while not self._stop.is_set():
            before = dict(self.acknowledged)
            try:
                with self._timed(f"read or {on_failure}"):
                    found, status = reader.read([[shelves]], np.full(len(shelves), AT_US))
            except FeatureStoreError:
                if on_failure == "missing":
                    self.problems.append("an error in spite of on_failure: missing")
                continue
            if on_failure == "missing" and (status == NOT_FOUND).all():
                self.seen["missing"] += 1
                time.sleep(0.01)
                continue
            for shelf, moment in before.items():
                if not found[shelf, 0] >= moment:
                    self.problems.append(f"shelf {shelf}: {found[shelf, 0]} after {moment}")

    def run(self, seconds: float) -> None:
        """Let the threads work while the server goes and comes."""
        work: list[Any] = [(self.write, number) for number in range(WRITERS)]
        work += [(self.read, kind) for kind in ("error", "missing")]
        threads = [threading.Thread(target=self._guard, args=each) for each in work]
        for thread in threads:
            thread.start()
        try:
            for leave, come in (
                (self._server.freeze, self._server.thaw),
                (lambda: self._server.stop(hard=True), self._server.start),
                (self._server.stop, self._server.start),
            ):
                self._expect_progress()
                leave()
                time.sleep(seconds)
                come()
            self._expect_progress()
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(30)

    def _expect_progress(self) -> None:
        before, deadline = self.seen.copy(), time.monotonic() + 15
        while time.monotonic() < deadline:
            gained = self.seen - before
            if (
                gained["write"] > 50
                and gained["read or error"] > 5
                and gained["read or missing"] > 5
            ):
                return
            time.sleep(0.05)
        raise AssertionError(f"no full recovery: {self.seen - before}")

    def _timed(self, what: str) -> _Timed:
        return _Timed(self, what)

    def _guard(self, work: Any, argument: Any) -> None:
        try:
            work(argument)
        except BaseException as error:
            self.problems.append(repr(error))


class _Timed:
    def __init__(self, outage: Outage, what: str) -> None:
        self._outage, self._what = outage, what

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        took_s = time.monotonic() - self._began
        self._outage.slowest_s = max(self._outage.slowest_s, took_s)
        self._outage.seen[self._what if kind is None else f"{self._what}: error"] += 1


def run(server: RedisServer, seconds: float) -> str:
    """Go through all outages; return what was seen."""
    outage = Outage(server)
    outage.run(seconds)
    assert not outage.problems, outage.problems[:5]
    assert outage.seen["write: error"]
    assert outage.seen["read or error: error"]
    assert outage.seen["missing"]
    # Connecting and then waiting for an answer may each take a timeout.
    assert outage.slowest_s < 2 * TIMEOUT_S + 1, f"a call took {outage.slowest_s:.1f} s"
    features = declare(store="redis", url=server.url)
    store = open_online(features, Path("unused"), "outage")
    shelves = np.array(sorted(outage.acknowledged))
    found, status = store.read_matrix("plain", [shelves], np.full(len(shelves), AT_US))
    assert (status[:, 0] == PRESENT).all()
    lost = [s for s, value in zip(shelves.tolist(), found[:, 0], strict=True)
            if value < outage.acknowledged[s]]  # fmt: skip
    assert not lost, f"acknowledged and lost: {lost}"
    return f"slowest call {outage.slowest_s:.2f} s; {dict(outage.seen)}; nothing acknowledged lost"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server = RedisServer(Path(name))
        try:
            print(run(server, given.seconds))
        finally:
            server.stop(hard=True)


if __name__ == "__main__":
    main()
