"""What a run ran with: code, configuration, environment, machine, person."""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_ray.metadata.changes import keep_source
from mlops_ray.metadata.digest import digest_bytes, digest_json

if TYPE_CHECKING:
    from mlops_ray.metadata.artifacts import ArtifactStore

LOCK_FILE = "requirements.lock"
_GPUS = Path("/proc/driver/nvidia/gpus")


def collect(
    folder: Path, config_digest: str, seed: int, artifacts: ArtifactStore | None = None
) -> dict[str, Any]:
    """Describe the present: source, lock, packages, machine, person. Takes a few hundredths of a second.

    ``commit``, ``dirty_digest`` and ``folder`` are those of ``SourceState``; ``changes`` is the
    artifact that holds what is not committed, None where all is. Values that cannot be known (no
    git, no lock file) are None. Digests are BLAKE2b-256, memory is in bytes.

    Raises:
        StorageError: The changes cannot be stored.
    """
    source, changes = keep_source(folder, artifacts)
    return {
        "commit": source.commit,
        "dirty_digest": source.dirty_digest,
        "folder": source.folder,
        "changes": changes.model_dump(mode="json") if changes else None,
        "config_digest": config_digest,
        "lock_digest": lock_digest(folder),
        "seed": seed,
        "python": platform.python_version(),
        "packages": installed_packages(),
        "machine": _machine(),
        "cluster": _cluster(),
        "user": _user(),
        "host": socket.gethostname(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def lock_digest(folder: Path) -> str:
    """Return the digest of the lock file in ``folder``, or else of the installed packages."""
    lock = folder / LOCK_FILE
    return digest_bytes(lock.read_bytes()) if lock.is_file() else digest_json(installed_packages())


def installed_packages() -> dict[str, str]:
    """Return the versions of all installed packages by their normalized names."""
    # Ray puts copies of some packages, which lie inside its own, on the path once it is imported.
    paths = [path for path in sys.path if "/ray/" not in path.rpartition("site-packages")[2]]
    changed = tuple((path, _changed_ns(path)) for path in paths)
    return dict(_packages_in(changed))


@lru_cache(maxsize=4)
def _packages_in(folders: tuple[tuple[str, int], ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for folder, changed_ns in reversed(folders):
        if changed_ns:
            found |= _packages_of(folder)
    return dict(sorted(found.items()))


def _packages_of(folder: str) -> dict[str, str]:
    """Read names and versions from the names of the folders that describe packages."""
    found: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, kind = os.path.splitext(entry.name)
            if kind not in (".dist-info", ".egg-info"):
                continue
            name, _, version = stem.partition("-")
            if kind == ".egg-info":
                version = metadata.PathDistribution(Path(entry.path)).version or version
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def _changed_ns(path: str) -> int:
    """Return when a folder was changed; 0 for what is none."""
    return os.stat(path).st_mtime_ns if os.path.isdir(path) else 0


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpu": _after_colon(Path("/proc/cpuinfo"), "model name"),
        "cpus": os.cpu_count(),
        "memory": _memory_bytes(),
        "gpus": [_after_colon(gpu / "information", "Model") for gpu in sorted(_GPUS.glob("*"))],
    }


def _after_colon(file: Path, name: str) -> str | None:
    try:
        found = re.search(rf"^{name}\s*:\s*(.*)$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _cluster() -> dict[str, Any] | None:
    """Describe the Ray that this process is connected to."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    resources = ray.cluster_resources()
    nodes = sum(name.startswith("node:") and "__" not in name for name in resources)
    wanted = {"cpus": "CPU", "gpus": "GPU", "memory": "memory"}
    amounts = {name: resources.get(key, 0.0) for name, key in wanted.items()}
    return {"ray": ray.__version__, "nodes": nodes} | amounts


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return None
