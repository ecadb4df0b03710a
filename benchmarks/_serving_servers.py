"""The servers of the serving benchmark: ours and a bare handler on Ray Serve, and the peers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks import _peers
from benchmarks._peers import Worker
from benchmarks._serving_load import Target, mark, processes
from benchmarks._serving_ray_work import BARE
from benchmarks._serving_world import PROJECT, WIDTH, World

READY_S = 120
HERE = _peers.REQUIREMENTS.parent

PEERS = {
    "uvicorn": "/predict",
    "bentoml": "/predict",
    "litserve": "/predict",
    "mlflow_serve": "/invocations",
}


DIRECT = "direct"
"""Our endpoint again, at its replica's own port: without HAProxy before it."""


@dataclass
class Servers:
    """All that run; ``ray`` is the process with our endpoint and the bare handler beside it."""

    targets: dict[str, Target]
    ray: Worker


@contextlib.contextmanager
def serve(world: World, *, peers: bool) -> Iterator[Servers]:
    """Start all servers, each in processes of its own; they end with the context. Without ``peers``
    there are only ours and the bare handler."""
    with ExitStack() as stack:
        others = [stack.enter_context(_peer(name, world)) for name in PEERS] if peers else []
        modes = ("throughput", "default") if peers else ("throughput",)
        rays = {mode: _ray(stack, mode, world) for mode in modes}
        with ThreadPoolExecutor() as pool:
            started = dict(
                zip(rays, pool.map(lambda ray: ray[0]("serve"), rays.values()), strict=True)
            )
        token, direct_port = started["throughput"]
        ray, port = rays["throughput"]
        path = f"/v1/models/{PROJECT}/predict"
        targets = [
            Target("ours", port, path, "ours", "throughput", token),
            Target(DIRECT, direct_port, path, "ours", "throughput", token),
            Target(BARE, port, f"/{BARE}", "features", "throughput"),
            *others,
        ]
        if peers:
            targets.append(
                Target("serve_default", rays["default"][1], f"/{BARE}", "features", "default")
            )
        for target in targets:
            _wait(target, world)
        yield Servers({target.name: target for target in targets}, ray)


def ask(target: Target, body: bytes) -> Any:
    """Send one request; return the content of the answer."""
    headers = {"content-type": "application/json"}
    if target.token:
        headers["authorization"] = f"Bearer {target.token}"
    url = f"http://127.0.0.1:{target.port}{target.path}"
    request = urllib.request.Request(url, body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _ray(stack: ExitStack, mode: str, world: World) -> tuple[Worker, int]:
    port = free_port()
    arguments = [mode, str(port), str(world.folder)]
    log = stack.enter_context((world.folder / f"{mode}.log").open("w"))
    worker = Worker(None, "_serving_ray_work.py", *arguments, log=log, environment=mark(mode))
    return stack.enter_context(worker), port


@contextlib.contextmanager
def _peer(name: str, world: World) -> Iterator[Target]:
    """Run a peer's server."""
    interpreter = _peers.python(name)
    port, script = free_port(), str(world.script(1))
    if name == "bentoml":
        line = [str(interpreter.parent / "bentoml"), "serve", "_serving_bentoml_work:Returns"]
        line += ["--host", "127.0.0.1", "--port", str(port)]
    else:
        file = "mlflow" if name == "mlflow_serve" else name
        line = [str(interpreter), str(HERE / f"_serving_{file}_work.py"), str(port), script]
    environment = (
        os.environ
        | mark(name)
        | {
            "SCRIPT": script,
            "WIDTH": str(WIDTH),
            "OMP_NUM_THREADS": "1",
            "BENTOML_HOME": str(world.folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
    )
    with (world.folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(line, cwd=HERE, env=environment, stdout=log, stderr=log)
    try:
        yield Target(name, port, PEERS[name], "features", name)
    finally:
        for pid in processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(30)


def _wait(target: Target, world: World) -> None:
    with world.bodies(target.bodies, 1).open("rb") as file:
        body = file.readline()
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            ask(target, body)
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if time.monotonic() > deadline_s or not processes(target.server):
                log = world.folder / f"{target.server}.log"
                why = log.read_text()[-2000:] if log.exists() else ""
                raise RuntimeError(f"{target.name} does not answer: {why}") from error
        time.sleep(0.1)
