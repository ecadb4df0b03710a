"""Kill a process that writes the prediction log, again and again, at random moments.

``python -m faults.kill_replica_log --kills 30``, in the folder ``tests``. Each round is a replica that
logs answers as fast as it can, compacts, and says which answers were on disk before it said so; it is
ended by SIGKILL. Some rounds end at a random moment, others in a compaction. Every answer that was
said to be on disk must be in the log once, and the monitor, which is begun anew at times, must have
counted what is in the log: no row more or less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from serving.log_samples import REFERENCE, answered, open_log

from mlops_ray.metadata.prediction_log.layout import segments
from mlops_ray.metadata.prediction_log.news import keep_from, read_news
from mlops_ray.metadata.prediction_log.reading import scan_predictions
from mlops_ray.serving.log.compaction import compact

LONGEST_S = 0.5
ROWS = 3


class Listener:
    """A monitor that keeps what it counted together with its positions, in one file."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        self._path = folder / "listener.json"
        kept = json.loads(self._path.read_text()) if self._path.exists() else [{}, [], 0]
        self.positions, self.ids, self.rows = kept

    def listen(self) -> None:
        """Take in what is new."""
        keep_from(self._log, "monitor", self.positions)
        while (news := read_news(self._log, self.positions)) is not None:
            self.ids += news.predictions["id"].to_pylist()
            days = news.buckets.get(REFERENCE.digest, {})
            self.rows += sum(profile.rows for profile in days.values())
            self.positions |= news.positions
            self._path.write_text(json.dumps([self.positions, self.ids, self.rows]))


def run(folder: Path, kills: int, seed: int = 0) -> str:
    """Do so many rounds; return what happened."""
    chance = random.Random(seed)
    durable: set[str] = set()
    # Nothing is removed from now on that it has not counted.
    Listener(folder).listen()
    for number in range(kills):
        durable |= one_round(folder, number, chance.random() * LONGEST_S, chance.random() < 0.5)
        if chance.random() < 0.5:
            Listener(folder).listen()
        check(folder, durable)
    assert compact(folder / "log") is not None
    listener = Listener(folder)
    listener.listen()
    check(folder, durable)
    there = ids(folder)
    assert Counter(listener.ids) == there, "the monitor has not counted what is in the log"
    assert listener.rows == len(there)
    keep_from(folder / "log", "monitor", listener.positions)
    assert compact(folder / "log") is not None
    assert not any(segments(folder / "log").values()), "files are left behind"
    check(folder, durable)
    return f"{kills} kills, {len(durable)} answers said to be on disk, {len(there)} kept"


def ids(folder: Path) -> Counter[str]:
    tables = scan_predictions(folder / "log", columns=["id"])
    return Counter(name for table in tables for name in table["id"].to_pylist())


def check(folder: Path, durable: set[str]) -> None:
    there = ids(folder)
    assert max(there.values(), default=1) == 1, "a row is there twice"
    missing = durable - there.keys()
    assert not missing, f"{len(missing)} rows are lost"


def one_round(folder: Path, number: int, kill_after_s: float, answers_wait: bool) -> set[str]:
    """Run one replica until it is killed; return the ids that it said were on disk."""
    durability = "answered" if answers_wait else "interval"
    command = [sys.executable, "-m", "faults.kill_replica_log"]
    command += ["--child", str(folder), "--name", str(number), "--durability", durability]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begin\n"
        timer = threading.Timer(kill_after_s, child.send_signal, [signal.SIGKILL])
        timer.start()
        said = child.stdout.read()
        timer.join()
        assert child.wait(30) == -signal.SIGKILL
    # A kill may cut the last line short.
    return {name for line in said.decode().split("\n")[:-1] for name in line.split()}


async def answer_on(folder: Path, name: str, durability: str) -> None:
    """Answer until the end comes; say what is on disk."""
    log = open_log(folder / "log", name, durability=durability, every="5ms", compact_every="100ms")
    await asyncio.to_thread(compact, folder / "log")
    print("begin", flush=True)
    log.start()
    number = 0
    while True:
        written = []
        for _ in range(10):
            names = [f"{name}-{number + row}" for row in range(ROWS)]
            added = log.add(answered(names))
            number += ROWS
            written += names
        if log.answers_wait:
            await log.written(added)
        while log.pending_rows:
            await asyncio.sleep(0.001)
        print(*written, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--durability", default="interval")
    given = parser.parse_args()
    if given.child is not None:
        asyncio.run(answer_on(given.child, given.name, given.durability))
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), given.kills, given.seed))


if __name__ == "__main__":
    main()
