"""Kill processes that store artifacts, again and again, at random moments.

``python -m faults.kill_put --kills 100``, in the folder ``tests``; with ``--s3`` on an S3 server of this
process's own. After each kill every artifact that was acknowledged must be whole, and so must be
everything else that can be seen in the store.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from metadata.stores import address, open_store, start_server

from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore

PUT = """
import random, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from metadata.stores import open_store
store = open_store(sys.argv[1], Path(sys.argv[2]))
chance = random.Random(sys.argv[3])
tree = Path(sys.argv[2]) / ("tree" + sys.argv[3])
print("ready", flush=True)
number = 0
while True:
    number += 1
    kind = chance.choice(["json", "table", "tree", "large"])
    if kind == "json":
        value = {"seed": sys.argv[3], "number": number}
    elif kind == "tree":
        for name in ("a", "deep/b", "deep/c"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(chance.randbytes(chance.randrange(200_000)))
        value = tree
    else:
        rows = 1_500_000 if kind == "large" else 1000
        value = pa.table({"n": np.arange(rows) + number, "seed": [sys.argv[3]] * rows})
    print(store.put(value).model_dump_json(), flush=True)
"""
LONGEST_S = 1.5


def run(folder: Path, where: str, kills: int, seed: int = 0) -> str:
    """Do rounds; return what happened."""
    chance = random.Random(seed)
    acknowledged: list[ArtifactRef] = []
    for number in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", PUT, where, str(folder / "cache"), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.random() * LONGEST_S)
        assert process.poll() is None
        process.kill()
        lines = process.communicate()[0].splitlines(keepends=True)
        refs = [ArtifactRef.model_validate_json(line) for line in lines if line.endswith("\n")]
        check(open_store(where, folder / "cache of another"), refs)
        acknowledged += refs
    store = open_store(where, folder / "cache of another")
    check(store, acknowledged)
    store.blobs.sweep(datetime.now(UTC))
    assert not list(folder.glob("store/.incoming-*"))
    return (
        f"{kills} kills, {len(acknowledged)} acknowledged, {len(list(store.blobs.blobs()))} blobs"
    )


def check(store: ArtifactStore, acknowledged: list[ArtifactRef]) -> None:
    """Check that all of these are whole, and all that is visible too."""
    for ref in acknowledged:
        assert store.verify(ref), ref
    for blob in store.blobs.blobs():
        assert store.blobs.verify(blob.digest), blob


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    given = parser.parse_args()
    server, endpoint = start_server() if given.s3 else (None, "")
    with tempfile.TemporaryDirectory() as scratch:
        place = address(endpoint) if given.s3 else f"{scratch}/store"
        print(run(Path(scratch), place, given.kills, given.seed))
    if server is not None:
        server.stop()  # type: ignore[attr-defined]
