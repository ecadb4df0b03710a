"""A Redis server of the tests' own, on a free port of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class RedisServer:
    """A server that keeps every acknowledged write; it can be stopped, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, with what it had stored."""
        program = shutil.which("redis-server")
        assert program is not None
        options = ["--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(
            [program, "--port", str(self.port), *options], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(100).startswith(b"+PONG"):
                        return
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError("the Redis server did not start")

    def stop(self, hard: bool = False) -> None:
        """End it; ``hard`` by SIGKILL."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGKILL if hard else signal.SIGTERM)
        self._process.wait(20)

    def freeze(self) -> None:
        """Let it hang: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def installed() -> bool:
    """Say whether there is a Redis server to start; in CI there has to be."""
    found = shutil.which("redis-server") is not None
    assert found or not os.environ.get("CI"), "redis-server is not installed: run setup/servers.sh"
    return found


def serve(folder: Path) -> Iterator[RedisServer]:
    """Run a server; a fixture yields from this."""
    if not installed():
        pytest.skip("redis-server IS NOT INSTALLED: Redis is not tested; run setup/servers.sh")
    server = RedisServer(folder)
    yield server
    server.stop()
