"""HAProxy with the configuration that Ray writes and we adapt: checked and run by HAProxy itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serving.certificates import write_certificate
from serving.harness import free_port

from mlops_ray.config.serving import Security, Serving
from mlops_ray.serving.deployment import haproxy, ingress

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux")


class _Echo(BaseHTTPRequestHandler):
    """Answers with the path and headers that reached it."""

    def do_GET(self) -> None:
        body = json.dumps({"path": self.path, "headers": dict(self.headers)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def replica() -> Iterator[int]:
    """The port of a server that stands for a replica, and for Serve's fallback proxy."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@dataclass
class Written:
    """A configuration file as Ray writes it, and where HAProxy then takes requests."""

    path: Path
    port: int
    stats_port: int


def write(folder: Path, replicas: dict[str, int], *, grpc: bool = False) -> Written:
    """Have Ray write the configuration for applications: a route prefix and a replica's port each."""
    from ray.serve._private import haproxy as rays
    from ray.serve._private.common import RequestProtocol
    from ray.serve.config import HTTPOptions, gRPCOptions

    port, stats_port = free_port(), free_port()
    config = rays.HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        grpc_options=gRPCOptions(
            port=free_port(), grpc_servicer_functions=["any.function"] if grpc else []
        ),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_port=free_port(),
        stats_port=stats_port,
        metrics_enabled=False,
        is_head=True,
        has_received_routes=True,
    )
    backends = {
        prefix: rays.BackendConfig(
            name=f"http-{number}",
            path_prefix=prefix,
            app_name=f"a{number}",
            servers=[rays.ServerConfig("one", "127.0.0.1", target)],
        )
        for number, (prefix, target) in enumerate(replicas.items())
    }
    if grpc:
        backends["grpc"] = rays.BackendConfig(
            name="grpc-a0",
            path_prefix="/",
            app_name="a0",
            servers=[rays.ServerConfig("one", "127.0.0.1", free_port())],
            protocol=RequestProtocol.GRPC,
        )
    path = folder / "haproxy.cfg"
    api = rays.HAProxyApi(config, backends, config_file_path=str(path))
    api._generate_config_file_internal()
    return Written(path, port, stats_port)


def binary() -> str:
    found = ingress.haproxy_binary()
    assert found is not None
    return found


def checked(path: Path) -> None:
    """Let HAProxy judge a configuration."""
    command = [binary(), "-c", "-f", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def started(folder: Path, written: Written, *more: str, **security: Any) -> subprocess.Popen[bytes]:
    """Start HAProxy as Ray would, and wait until it takes requests."""
    serving = Serving(security=Security(**security))
    starter = ingress.starter(folder / "starter", binary(), serving)
    process = subprocess.Popen([str(starter), "-db", "-f", str(written.path), "-dR", *more])
    wait_until(lambda: haproxy._listens("127.0.0.1", str(written.port)))
    return process


def wait_until(holds: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def get(url: str, **more: Any) -> tuple[int, Message, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10, **more) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def binds(text: str) -> dict[str, str]:
    """Each section's first bind line."""
    found: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            section = line.split()[-1]
        elif line.split()[:1] == ["bind"]:
            found.setdefault(section, line.strip())
    return found


def test_pages_for_operators_are_on_loopback_only(tmp_path: Path) -> None:
    written = write(tmp_path, {"/": 1}, grpc=True)
    before = written.path.read_text()
    assert "*" in binds(before)["stats"]
    haproxy.adapt(written.path, "", "", again=True)
    after = written.path.read_text()
    assert all(bind.split()[1].startswith("127.0.0.1:") for bind in binds(after).values())
    assert len(binds(after)) == 4
    assert "mode 666" in before
    assert "mode 666" not in after
    checked(written.path)
    assert haproxy.adapted(after, tmp_path) == after


def test_http_and_grpc_speak_tls(tmp_path: Path) -> None:
    written = write(tmp_path, {"/": 1}, grpc=True)
    certificate, key = write_certificate(tmp_path)
    haproxy.adapt(written.path, str(certificate), str(key), again=True)
    found = binds(written.path.read_text())
    assert "ssl crt" in found["http_frontend"]
    assert "ssl crt" in found["grpc_frontend"]
    assert "proto h2" not in found["grpc_frontend"]
    assert "ssl" not in found["stats"]
    checked(written.path)
    assert (tmp_path / "endpoint.pem").stat().st_mode & 0o077 == 0


def test_without_a_place_for_tls_it_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text("global\n    maxconn 10\n")
    certificate, key = write_certificate(tmp_path)
    with pytest.raises(ValueError, match="front end"):
        haproxy.adapt(path, str(certificate), str(key), again=True)


def test_each_application_has_both_protocols(tmp_path: Path, replica: int) -> None:
    written = write(tmp_path, {"/": replica, "/v1/models/two": replica})
    process = started(tmp_path, written)
    try:
        base = f"http://127.0.0.1:{written.port}"
        for asked, seen in {
            "/v1/models/shop/predict": "/v1/models/shop/predict",
            "/v2/models/shop/infer": "/v2/models/shop/infer",
            "/v1/models/two/predict": "/v1/models/two/predict",
            "/v2/models/two/infer": "/v1/models/two/v2/models/two/infer",
            "/v2/models/two": "/v1/models/two/v2/models/two",
            "/v2/models/twofold/infer": "/v2/models/twofold/infer",
        }.items():
            status, _, content = get(base + asked)
            assert (status, content["path"]) == (200, seen)
        assert content["headers"]["x-request-disconnect-disabled"] == "?1"
    finally:
        process.kill()
        process.wait()


def test_no_replica_is_an_error_of_the_endpoints_form(tmp_path: Path) -> None:
    written = write(tmp_path, {"/": free_port()})
    process = started(tmp_path, written)
    try:
        status, headers, content = get(f"http://127.0.0.1:{written.port}/v1/models/shop/metadata")
    finally:
        process.kill()
        process.wait()
    assert status == 503
    assert headers["Retry-After"] == "1"
    assert content["error"]["field"] is None
    assert "try again" in content["error"]["message"]


def test_a_client_that_trusts_the_certificate_is_answered(tmp_path: Path, replica: int) -> None:
    written = write(tmp_path, {"/": replica})
    certificate, key = write_certificate(tmp_path)
    process = started(tmp_path, written, certificate=certificate, key=key)
    try:
        trusting = ssl.create_default_context(cafile=str(certificate))
        url = f"https://127.0.0.1:{written.port}/v1/models/shop/metadata"
        assert get(url, context=trusting)[0] == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            get(url, context=ssl.create_default_context())
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            get(url.replace("https", "http"))
    finally:
        process.kill()
        process.wait()


def test_a_stand_in_serves_until_the_next_one(
    tmp_path: Path, replica: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", str(replica))
    written = write(tmp_path, {"/": replica})
    url = f"http://127.0.0.1:{written.port}/v1/models/shop/metadata"
    first = started(tmp_path, written)
    assert get(url)[0] == 200
    first.kill()
    first.wait()
    wait_until(lambda: haproxy._listens("127.0.0.1", str(written.port)))
    assert get(url)[0] == 200
    stand_in = int((tmp_path / "stand-in.pid").read_text())

    # Ray's next one starts without knowing an application; the last configuration serves meanwhile.
    empty = tmp_path / "empty"
    empty.mkdir()
    written.path.write_bytes(write(empty, {}).path.read_bytes())
    second = started(tmp_path, written)
    wait_until(lambda: not _runs(stand_in))
    assert get(url)[0] == 200
    wait_until(lambda: not (tmp_path / "stand-in.pid").exists())
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    wait_until(lambda: (tmp_path / "stand-in.pid").exists())
    last = int((tmp_path / "stand-in.pid").read_text())
    os.kill(last, signal.SIGKILL)


def test_there_is_no_stand_in_where_serve_has_ended(
    tmp_path: Path, replica: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", str(free_port()))
    written = write(tmp_path, {"/": replica})
    process = started(tmp_path, written)
    guard = _guard_of(tmp_path)
    process.kill()
    process.wait()
    wait_until(lambda: not _runs(guard))
    assert not haproxy._listens("127.0.0.1", str(written.port))
    assert not (tmp_path / "stand-in.pid").exists()


def test_it_ends_with_a_killed_parent(tmp_path: Path) -> None:
    folder = tmp_path / "a folder with blanks"
    starter = ingress.starter(folder, "/bin/sleep", Serving())
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"child = subprocess.Popen([{str(starter)!r}, '60'])\n"
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
    wait_until(lambda: not _runs(child))


def _guard_of(folder: Path) -> int:
    """The process that watches the HAProxy of a folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder / "starter" / "haproxy.py").encode() in command:
                return int(entry.name)
    raise AssertionError("there is no guard")


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_ports_are_looked_at_where_they_are_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert haproxy._listens("*", str(taken.getsockname()[1]))
    assert not haproxy._listens("*", str(free_port()))
