"""Kill MLflow's server, and the process that mirrors runs into it, at random moments.

``python -m faults.kill_mirror --kills 30``, in the folder ``tests``. In the end MLflow's own client must
see every run and each of its steps exactly once, complete.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from metadata.mirror_world import add_run, check

from mlops_ray.metadata.home import Home, Storage

MIRROR = """
import sys
from pathlib import Path
from mlops_ray.metadata import tracking
from mlops_ray.metadata.home import Home, Storage
from mlops_ray.metadata.mirror import mirror
home = Home(Path(sys.argv[1]), Storage(tracking=sys.argv[2]))
tracking.connect(home)
import mlflow.entities
print("ready", flush=True)
print(mirror(home), flush=True)
"""
LONGEST_S = 1.5


class Server:
    """An MLflow server on a port of its own, over a database in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        store = f"sqlite:///{self.folder}/mlflow.db"
        options = ["--backend-store-uri", store, "--default-artifact-root", str(self.folder)]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options, *where],
                stdout=log,
                stderr=log,
                # Its queue of background jobs takes longer to start than all the rest.
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(folder: Path, kills: int, seed: int = 0) -> str:
    """Do rounds until so many were killed; return what happened."""
    chance = random.Random(seed)
    server = Server(folder / "server")
    server.start()
    home = Home(folder / "home", Storage(tracking=server.url))
    killed = {"mirror": 0, "server": 0}
    runs = finished = 0
    try:
        while sum(killed.values()) < kills:
            for _ in range(2):
                add_run(home, runs)
                runs += 1
            process = start(home)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(chance.random() * LONGEST_S)
            victim = "server" if chance.random() < 0.25 else "mirror"
            killed[victim] += 1
            if victim == "server":
                server.kill()
                assert process.wait(60) in (0, 1)
                server.start()
            else:
                finished += process.poll() is not None
                process.kill()
                process.wait()
        process = start(home)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        shown = check(home)
    finally:
        server.kill()
    return f"{killed}, {finished} were through before; {runs} runs are {shown} in MLflow, once each"


def start(home: Home) -> subprocess.Popen[str]:
    """Start a process that mirrors what there is."""
    return subprocess.Popen(
        [sys.executable, "-c", MIRROR, str(home.root), str(home.storage.tracking)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(run(Path(scratch), given.kills, given.seed))
