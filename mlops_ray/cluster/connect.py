"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlops_ray.config.project import Cluster
from mlops_ray.errors import ClusterError

_MEMORY_SHARE = 0.1
_LEAST_STORE_BYTES = 200 * 2**20
_MOST_STORE_BYTES = 2 * 2**30


def prepare_environment() -> None:
    """Set what Ray reads from the environment, and let a Ray that was imported before read it again.

    Token authentication has to be on in every client of a cluster or in none: driver, jobs, HTTP
    clients and actors.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Inside a Ray job, what we set is added to the job's own runtime environment, not refused.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "ray" in sys.modules and not sys.modules["ray"].is_initialized():
        from ray import _raylet

        _raylet.Config.initialize("")  # type: ignore[attr-defined]


def resolve_address(cluster: Cluster) -> str:
    """Return the address to join: the configured one, else ``$RAY_ADDRESS``, else ``local``."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or "local"


def worker_environment(roots: Sequence[Path]) -> dict[str, str]:
    """Return the environment variables that workers need to import the project's code."""
    paths = [str(root) for root in roots]
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    variables = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))} if paths else {}
    if "MLOPS_RAY_HOME" in os.environ:
        variables["MLOPS_RAY_HOME"] = os.environ["MLOPS_RAY_HOME"]
    return variables


_JOIN_FIX = "run `mlops-ray doctor` to see what is wrong with ports, token and versions"
_START_FIX = f"where Ray runs here already, join it by cluster.address=auto; otherwise {_JOIN_FIX}"


def connect(cluster: Cluster, *, roots: Sequence[Path] = ()) -> Any:
    """Join or start Ray; return Ray's context. Does nothing when already connected.

    Args:
        cluster: Which Ray.
        roots: Folders with the project's Python code, put on the workers' import path.

    Raises:
        ClusterError: There is no cluster at the address, or it refuses us.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        return None
    address = resolve_address(cluster)
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": worker_environment(roots)},
        "log_to_driver": False,
        "logging_level": "warning",
    }
    if address == "local":
        options |= _local_options(cluster)
    try:
        return ray.init(address=address, **options)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cannot {'start' if address == 'local' else 'join'} Ray",
            where=address,
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix=_START_FIX if address == "local" else _JOIN_FIX,
        ) from error


def join(address: str | None = None) -> Any:
    """Join a Ray that runs: at ``address``, else at ``$RAY_ADDRESS``, else the one on this machine.

    Raises:
        ClusterError: There is none, or it refuses us.
    """
    return connect(Cluster(address=address or os.environ.get("RAY_ADDRESS") or "auto"))


def _local_options(cluster: Cluster) -> dict[str, Any]:
    return {
        "num_cpus": cluster.num_cpus or max(8, os.cpu_count() or 1),
        "include_dashboard": True,
        "dashboard_port": cluster.dashboard_port,
        "object_store_memory": cluster.object_store_bytes or _object_store_bytes(),
    }


def _object_store_bytes() -> int:
    """A tenth of the machine's memory: artifacts are memory-mapped files, not Ray objects."""
    if sys.platform == "linux":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        total = 8 * 2**30
    return int(min(max(total * _MEMORY_SHARE, _LEAST_STORE_BYTES), _MOST_STORE_BYTES))
