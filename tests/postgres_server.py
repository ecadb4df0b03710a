"""A PostgreSQL server of the tests' own, on a free port of this machine."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

_USER = "tester"


class PostgresServer:
    """A server with databases of its own; it can be stopped, killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder = folder
        self._account = _account()
        self._process: subprocess.Popen[bytes] | None = None
        if self._account is not None:
            os.chown(folder, *self._account)
        self._run("initdb", "--username", _USER, "--auth", "trust", "--no-sync", "-E", "UTF8")
        self.start()

    def start(self) -> None:
        """Start it, with what it had stored."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "max_connections": 200,
            "full_page_writes": "off",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self._process = self._start("postgres", *options)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            ask = [str(_program("pg_isready")), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
            if subprocess.run(ask, check=False).returncode == 0:
                return
            time.sleep(0.05)
        raise RuntimeError("the PostgreSQL server did not start")

    def stop(self, hard: bool = False) -> None:
        """End it and all its connections; ``hard`` by SIGQUIT, which is like a crash."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT if hard else signal.SIGINT)
        self._process.wait(30)

    def new_database(self) -> str:
        """Make an empty database and return its URL."""
        import psycopg

        name = f"test_{uuid.uuid4().hex[:12]}"
        server = f"host=127.0.0.1 port={self.port} user={_USER} dbname=postgres"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://{_USER}@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *options: str) -> None:
        process = self._start(program, *options)
        if process.wait(120) != 0:
            raise RuntimeError(f"{program} failed: {(self.folder / 'log').read_text()}")

    def _start(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        user, group = self._account or (None, None)
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(_program(program)), "-D", str(self.folder / "data"), *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=user,
                group=group,
                extra_groups=None if user is None else [],
            )


def _account() -> tuple[int, int] | None:
    """The user and group to run it as: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return found.pw_uid, found.pw_gid
    raise RuntimeError("there is neither a user postgres nor a user nobody")


def _program(name: str) -> Path | None:
    """Debian keeps the server's programs out of the path."""
    if found := shutil.which(name):
        return Path(found)
    kept = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return kept[-1] if kept else None


def installed() -> bool:
    """Say whether there is a PostgreSQL server to start; in CI there has to be."""
    found = _program("initdb") is not None and _program("postgres") is not None
    assert found or not os.environ.get("CI"), "postgresql is not installed: run setup/servers.sh"
    return found


def serve() -> Iterator[PostgresServer]:
    """Run a server; a fixture yields from this."""
    if not installed():
        pytest.skip("postgresql IS NOT INSTALLED: it is not tested; run setup/servers.sh")
    # Not below pytest's own folder: the account that it runs as may not enter there.
    folder = Path(tempfile.mkdtemp(prefix="mlops-ray-postgres-"))
    try:
        server = PostgresServer(folder)
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
