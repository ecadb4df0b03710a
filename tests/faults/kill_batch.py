"""Kill the driver and the workers of batch scoring, again and again, at random moments.

``python -m faults.kill_batch --kills 20``, in the folder ``tests``. A batch is begun by a process of
its own on a Ray cluster that lives on. At random moments a worker is ended by SIGKILL, or the process;
then the same batch is begun again, until it comes to its end. Meanwhile the output must be the one
before, whole, or for a moment none. In the end every row must be there once, in its place and with
its score, in the output and in the prediction log. Batches take turns: one replaces a folder of
Parquet, the next adds to a Delta table.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from deltalake import DeltaTable
from serving import shop
from serving.batch_world import by_hand, fill_offline, score, visits

from mlops_ray.metadata.home import Home
from mlops_ray.metadata.prediction_log.reading import read_predictions

ROWS = 6_000
PIECE_ROWS = 150
LONGEST_S = 3.0
WORKER = b"ray::MapWorker"


def run(folder: Path, kills: int, seed: int = 0) -> str:
    """Do batches until so many processes were killed; return what happened. Ray is up."""
    import ray

    chance = random.Random(seed)
    home = Home(folder / "home")
    fill_offline(home)
    packages = [shop.write_package(folder / f"m{number}", number) for number in (1, 2)]
    table = visits(ROWS)
    pq.write_table(table, folder / "in.parquet", row_group_size=1000)
    expected = [by_hand(table, package) for package in packages]
    address = ray.get_runtime_context().gcs_address
    killed = {"driver": 0, "worker": 0}
    batches = resumed = 0
    while sum(killed.values()) < kills:
        model, how = batches % 2, ("parquet", "delta")[batches // 2 % 2]
        kept = None
        while kept is None:
            driver = start(folder, address, model, how, batches)
            enough = sum(killed.values()) >= kills
            kept = waited(driver, None if enough else chance.random() * LONGEST_S)
            if kept is None and chance.random() < 0.5 and (workers := workers_of(os.getpid())):
                os.kill(chance.choice(workers), signal.SIGKILL)
                killed["worker"] += 1
                kept = waited(driver, chance.random() * LONGEST_S)
            if kept is None:
                driver.send_signal(signal.SIGKILL)
                driver.wait(30)
                killed["driver"] += 1
            if how == "parquet":
                check_parquet(folder, table, expected)
        resumed += kept
        batches += 1
        if how == "parquet":
            assert check_parquet(folder, table, expected) == model, "the output is an older one"
        else:
            check_delta(folder, batches)
    logged = read_predictions(home.predictions("shop"))
    assert len(set(logged["id"].to_pylist())) == logged.num_rows, "the log has rows twice"
    assert logged.num_rows == ROWS * batches, "the log has lost rows, or has some of two jobs"
    return f"{sum(killed.values())} killed {killed}; {batches} batches, {resumed} pieces kept"


def check_parquet(folder: Path, table: Any, expected: Any) -> int:
    """Check that the output is whole; return which model's it is, −1 for none."""
    output = folder / "out"
    if not output.is_dir():
        return -1
    scored = pq.read_table(output)
    assert scored.select(table.column_names).equals(table), "rows are lost, doubled or mixed up"
    for model, scores in enumerate(expected):
        if np.allclose(scored["score"].to_numpy(), scores, rtol=0, atol=1e-6):
            return model
    raise AssertionError("the scores are no model's")


def check_delta(folder: Path, batches: int) -> None:
    """Check that each batch has been added once."""
    found = DeltaTable(str(folder / "lake")).to_pyarrow_table(columns=["number", "batch"])
    counted = found.group_by(["number", "batch"]).aggregate([([], "count_all")])
    assert set(counted["count_all"].to_pylist()) == {1}, "rows have come twice"
    known = found["batch"].unique().to_pylist()
    assert found.num_rows == ROWS * len(known), "rows are lost"
    assert batches - 1 in known


def start(folder: Path, address: str, model: int, how: str, batch: int) -> subprocess.Popen[str]:
    """Begin a batch; return when a worker has begun a piece."""
    began_s = time.time()
    arguments = [str(folder), address, str(model), how, str(batch)]
    process = subprocess.Popen(
        [sys.executable, "-m", "faults.kill_batch", "--child", *arguments],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    work = ".out.batch" if how == "parquet" else ".lake.batch"
    while process.poll() is None and not begun_since(folder / work, began_s):
        time.sleep(0.02)
    return process


def begun_since(work: Path, moment_s: float) -> bool:
    """Whether a worker has begun a piece since a moment."""
    try:
        return any(f.stat().st_mtime > moment_s for f in work.glob("*/begun/*"))
    except OSError:
        return False


def waited(process: subprocess.Popen[str], within_s: float | None) -> int | None:
    """Return how many pieces an ended process has taken over, None where it is not at its end."""
    try:
        code = process.wait(within_s)
    except subprocess.TimeoutExpired:
        return None
    assert process.stdout is not None
    said = process.stdout.read()
    assert code == 0, f"the batch failed: {said}"
    return int(said.split()[-1])


def workers_of(root: int) -> list[int]:
    """Return the processes below ``root`` that score."""
    below, found = [root], []
    for process in below:
        try:
            for task in Path(f"/proc/{process}/task").iterdir():
                below += map(int, (task / "children").read_text().split())
            if WORKER in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
        except OSError:
            continue
    return found


def _child(folder: Path, address: str, model: int, how: str, batch: int) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="error")
    print("ready", flush=True)
    source = folder / "in.parquet"
    if how == "delta":
        # Another input each time; it has the number of its batch in a column.
        source = folder / f"in-{batch}.parquet"
        if not source.is_file():
            table = visits(ROWS)
            table = table.append_column("batch", [np.full(ROWS, batch)])
            pq.write_table(table, folder / "draft.parquet", row_group_size=1000)
            (folder / "draft.parquet").rename(source)
    result = score(
        Home(folder / "home"),
        folder / f"m{model + 1}",
        source,
        folder / ("out" if how == "parquet" else "lake"),
        output_format=how,
        append=how == "delta",
        piece_rows=PIECE_ROWS,
        batch_rows=50,
        workers=2,
        log=True,
        run=f"run-{batch}",
    )
    print(result.resumed_pieces, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=5)
    given = parser.parse_args()
    if given.child:
        folder, address, model, how, batch = given.child
        _child(Path(folder), address, int(model), how, int(batch))
        return
    from mlops_ray.cluster.connect import prepare_environment

    prepare_environment()
    import ray

    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), given.kills, given.seed), f"{time.monotonic() - began_s:.0f} s")
    ray.shutdown()


if __name__ == "__main__":
    main()
