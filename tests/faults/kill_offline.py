"""Kill processes that append to a view and compact it, again and again, at random moments.

``python -m faults.kill_offline --kills 50``, in the folder ``tests``. In each round one process appends
step after step from the stored watermark on, another compacts, and both are ended by SIGKILL at random
moments. After each round the store must be readable, hold every step up to its watermark exactly once,
and every step that was acknowledged. In the end the same must hold after compaction and vacuum, for
the newest version and for one that a manifest pinned.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
from features.online_samples import declare

from mlops_ray.features import compaction, intake, offline
from mlops_ray.features.definitions import define
from mlops_ray.features.manifest import TrainingManifest, ViewPin, write_manifest
from mlops_ray.features.offline import OfflineStore

VIEW = "plain"
LONGEST_S = 1.0


def run(folder: Path, kills: int, seed: int = 0) -> str:
    """Do rounds until so many processes were killed; return what happened."""
    store = OfflineStore(folder, declare())
    chance = random.Random(seed)
    acknowledged = pinned = killed = rounds = 0
    seen = -1, 0
    expected: Counter[int] = Counter()
    while killed < kills:
        rounds += 1
        children = {name: _start(folder, name) for name in ("append", "compact")}
        last = time.monotonic()
        for process in chance.sample([*children.values()], 2):
            time.sleep(chance.random() * LONGEST_S / 2)
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            process.send_signal(signal.SIGKILL)
            killed += 1
        assert time.monotonic() - last < 60
        for name, process in children.items():
            said, _ = process.communicate(timeout=30)
            steps = [int(line) for line in said.splitlines() if line]
            if name == "append" and steps:
                acknowledged = max(acknowledged, steps[-1])
        steps_stored = check(store, acknowledged)
        added = sum(rows.num_rows for rows in store.changes(VIEW, seen[0]))
        steps = range(seen[1] + 1, steps_stored + 1)
        assert added == sum(map(rows_in, steps)), "the commits say otherwise"
        seen = store.version(VIEW), steps_stored
        if rounds == kills // 4 + 1 and steps_stored:
            pinned = store.version(VIEW)
            expected = _steps(store, pinned)
            _pin(store, pinned)
    store.compact(VIEW)
    deleted = store.vacuum(VIEW, retention=timedelta(0))
    steps_stored = check(store, acknowledged)
    if pinned:
        assert _steps(store, pinned) == expected, "a pinned version has changed"
    return (
        f"{killed} processes killed in {rounds} rounds; {steps_stored} steps in "
        f"{store.version(VIEW) + 1} commits, {acknowledged} acknowledged, {len(deleted)} files vacuumed"
    )


def check(store: OfflineStore, acknowledged: int) -> int:
    """Check that each step up to the watermark is stored once; return how many there are."""
    watermark = store.watermark(VIEW) or 0
    assert acknowledged <= watermark, "an acknowledged step is lost"
    found = _steps(store)
    assert found == Counter({step: rows_in(step) for step in range(1, watermark + 1)}), (
        "rows are lost or doubled"
    )
    return watermark


def rows_in(step: int) -> int:
    """Few rows go to the tail; each seventh step has many, which go to the buckets."""
    return 700 if step % 7 == 0 else 1 + step % 40


def rows_of(step: int) -> pa.Table:
    count = rows_in(step)
    columns = [
        np.arange(count),
        [step] * count,
        [step] * count,
        [float(step)] * count,
        [0.0] * count,
    ]
    schema = define(declare(), VIEW).schema
    arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _steps(store: OfflineStore, version: int | None = None) -> Counter[int]:
    values = store.read(VIEW, version, columns=["a"])["a"].to_pylist()
    return Counter(int(value) for value in values)


def _pin(store: OfflineStore, version: int) -> None:
    pin = ViewPin(
        definition=define(declare(), VIEW).digest,
        table=store.table_id(VIEW),
        version=version,
        generation="",
        ttl_us=None,
        features={},
    )
    manifest = TrainingManifest(
        service="faults",
        labels="",
        views={VIEW: pin},
        until=None,
        known_only=True,
        on_demand="",
        rows=0,
        result="",
    )
    write_manifest(store.root, manifest)


def _start(folder: Path, name: str) -> subprocess.Popen[str]:
    """Start a process; return when it begins to work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "faults.kill_offline", "--child", name, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _child(name: str, folder: Path) -> None:
    intake.TAIL_ROWS = compaction.TAIL_ROWS = 500
    offline._TIDY_EVERY = 8
    store = OfflineStore(folder, declare())
    step = store.watermark(VIEW) or 0
    store.read(VIEW)
    print("ready", flush=True)
    while True:
        if name == "compact":
            store.compact(VIEW)
            continue
        step += 1
        store.append(VIEW, rows_of(step), step)
        print(step, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2)
    given = parser.parse_args()
    if given.child:
        _child(given.child[0], Path(given.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), given.kills, given.seed))


if __name__ == "__main__":
    main()
