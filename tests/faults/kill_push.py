"""Kill a process that takes in pushed events, again and again, at random moments.

``python -m faults.kill_push --kills 50``, in the folder ``tests``. Each round is a process that pushes
events from the first that is not in the log on, and says so after each push; it is ended by SIGKILL.
Every event that was acknowledged must be in the log, none twice, none left out before it. In the
end the feature rows must be those of a backfill of the log.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from mlops_ray.config.features import Features
from mlops_ray.features.columns import from_us
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.pushed import PushedFeatures
from mlops_ray.features.sources import open_source

VIEWS = ("newest", "counted")
LONGEST_S = 0.4


def declare() -> Features:
    view = {"entity": "shop", "source": "sales", "event_time": "at"}
    return Features.model_validate(
        {
            "sources": {"sales": {"push": {"shop": "int", "number": "int", "at": "timestamp"}}},
            "entities": {"shop": {"keys": {"shop": "int"}}},
            "views": {
                "newest": view | {"columns": {"number": "int"}},
                "counted": view
                | {
                    "every": "1s",
                    "windows": ["5s"],
                    "aggregates": {"rows": {"by": "count"}, "total": {"by": "sum", "of": "number"}},
                },
            },
            "services": {},
            "labels": dict.fromkeys(("source", "id", "time", "label", "known_at"), "sales"),
        }
    )


def run(folder: Path, kills: int, seed: int = 0) -> str:
    """Do so many rounds; return what happened."""
    chance = random.Random(seed)
    acknowledged = 0
    for _ in range(kills):
        said = one_round(folder, chance.random() * LONGEST_S)
        acknowledged = max([acknowledged, *said])
        numbers = logged(folder)
        assert numbers == list(range(len(numbers))), "an event is missing, or there twice"
        assert len(numbers) >= acknowledged, "an acknowledged event is lost"
    features = declare()
    pushed = open_here(folder, features)
    pushed.tick()
    until_us = pushed._last_us
    pushed.close()
    again = OfflineStore(folder / "again", features)
    events = open_source(features.sources["sales"], folder / "events/sales").read_all()
    online = open_online(features, folder / "again online", "faults")
    pipeline = FeaturePipeline(features, {"sales": events}, again, online, live=True)
    pipeline.advance(from_us(until_us))
    for view in VIEWS:
        ours, theirs = (
            sorted(map(repr, store.read(view).to_pylist()))
            for store in (OfflineStore(folder / "offline", features), again)
        )
        assert ours == theirs
    return f"{kills} kills, {acknowledged} events acknowledged, {len(logged(folder))} kept"


def one_round(folder: Path, kill_after_s: float) -> list[int]:
    """Run one process until it is killed; return what it said, how many events are stored."""
    command = [sys.executable, "-m", "faults.kill_push", "--child", str(folder)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begin\n"
        timer = threading.Timer(kill_after_s, child.send_signal, [signal.SIGKILL])
        timer.start()
        said = child.stdout.read()
        timer.join()
        assert child.wait(30) == -signal.SIGKILL
    # A kill may cut the last line short.
    return [int(line) for line in said.split(b"\n")[:-1]]


def logged(folder: Path) -> list[int]:
    source = declare().sources["sales"]
    numbers: list[int] = (
        open_source(source, folder / "events/sales").read_all()["number"].to_pylist()
    )
    return numbers


def open_here(folder: Path, features: Features) -> PushedFeatures:
    offline = OfflineStore(folder / "offline", features)
    online = open_online(features, folder / "online", "faults")
    return PushedFeatures(features, folder / "events", offline, online, commit_rows=50)


def push_on(folder: Path) -> None:
    """Push events until the end comes."""
    from mlops_ray.features.sources import log

    log._FULL_RECORDS = 20
    pushed = open_here(folder, declare())
    print("begin", flush=True)
    number, chance = len(logged(folder)), random.Random()
    while True:
        count = chance.randint(1, 5)
        at = from_us(1_700_000_000_000_000 + number * 100_000)
        rows = [{"shop": n % 7, "number": n, "at": at} for n in range(number, number + count)]
        pushed.push("sales", rows)
        number += count
        print(number, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--child", type=Path)
    given = parser.parse_args()
    if given.child is not None:
        push_on(given.child)
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), given.kills))


if __name__ == "__main__":
    main()
