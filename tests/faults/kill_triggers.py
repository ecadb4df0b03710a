"""Kill the trigger actor again and again, at random moments, while triggers fire.

``python -m faults.kill_triggers --kills 20``, in the folder ``tests`` with ``PYTHONPATH=..``.
Triggers fire by hand and by a schedule whose clock is put forward. In the end each firing must have
exactly one job, and none may be left out.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from cluster.test_cluster_trigger_actor import Bench

from mlops_ray.cli.init import write_project
from mlops_ray.cluster import trigger_actor
from mlops_ray.cluster.connect import prepare_environment
from mlops_ray.config.locate import open_workspace
from mlops_ray.orchestration.load import load_project
from mlops_ray.orchestration.triggers import by_hand

LONGEST_S = 4.0
OWN = {"overlap": "allow", "overrides": ["until={at}"]}


def run(folder: Path, kills: int, seed: int = 0) -> str:
    """Kill so many times; return what happened. Ray is up."""
    chance = random.Random(seed)
    write_project(folder / "shop", "shop", "shop")
    project = load_project(open_workspace(folder / "shop"), [f"home={folder / 'home'}"])
    hourly = {"workflow": "a", "cron": "0 * * * *", "catch_up": "all", "catch_up_most": 1000}
    bench = Bench(project, {"button": {"workflow": "b", **OWN}, "hourly": hourly | OWN})
    bench.start()
    for number in range(kills):
        bench.ledger.fire(by_hand("shop", "button", str(number)))
        bench.put_forward(3600)
        if chance.random() < 0.3:
            (bench.home.root / "deadly").touch()
            bench.put_forward(3600)
        time.sleep(chance.random() * LONGEST_S)
        bench.kill()
    bench.wait(lambda: set(bench.states()) == {"succeeded"})
    trigger_actor.stop("shop")
    return check(bench, kills)


def check(bench: Bench, kills: int) -> str:
    """Compare firings with jobs, and with what should have fired."""
    firings = bench.firings()
    jobs = Counter(job["key"] for job in bench.jobs())
    assert jobs == Counter(firing.key for firing in firings), (firings, jobs)
    by_trigger = Counter(firing.trigger for firing in firings)
    assert by_trigger["button"] == kills, by_trigger
    hours = sorted(firing.at for firing in firings if firing.trigger == "hourly")
    gaps = {later - earlier for earlier, later in pairwise(hours)}
    assert gaps <= {timedelta(hours=1)}, hours
    assert len(hours) >= kills, hours
    return f"{kills} kills, {len(firings)} firings, each with one job"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    prepare_environment()
    import ray

    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), str(here.parent)])
    ray.init(num_cpus=8, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    with tempfile.TemporaryDirectory() as folder:
        print(run(Path(folder), given.kills, given.seed))


if __name__ == "__main__":
    main()
