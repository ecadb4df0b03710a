"""Starting Serve: ports, environment, and a proxy that ends with its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlops_ray.config.serving import Serving
from mlops_ray.errors import ServingError
from mlops_ray.serving.deployment import runtime


def test_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} cannot be used") as caught:
            runtime._check_port_is_free("127.0.0.1", port)
    assert "serving.port" in caught.value.fix
    runtime._check_port_is_free("127.0.0.1", port)


def test_default_mode_needs_no_environment() -> None:
    assert runtime.environment(Serving(mode="default")) == {}


def test_without_haproxy_the_default_mode_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "_haproxy_binary", lambda: None)
    assert runtime.environment(Serving()) == {}
    assert "default ingress" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux only")
def test_clusters_get_files_and_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = runtime.environment(Serving()), runtime.environment(Serving())
    own = {name for name in first if name.endswith(("_PATH", "_LOC", "_BASE", "_FILE"))}
    assert len(own) == 6
    assert all(first[name] != second[name] for name in own)
    assert len(first["RAY_SERVE_HAPROXY_SOCKET_PATH"]) + 57 < 95
    ports = [int(value) for name, value in first.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 6
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", int(first["RAY_SERVE_HAPROXY_STATS_PORT"])))
        taken.listen()
        third = runtime.environment(Serving())
    assert not {value for name, value in third.items() if name.endswith("_PORT")} & set(
        map(str, ports)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_proxy_ends_with_a_killed_parent(tmp_path: Path) -> None:
    folder = tmp_path / "a folder with blanks"
    folder.mkdir()
    wrapper = runtime._wrapper(folder, "/bin/sleep")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([{str(wrapper)!r}, '60'])\n"
            "while open(f'/proc/{child.pid}/comm').read() != 'sleep\\n': time.sleep(0.01)\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline_s = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return "(sleep) Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
