"""What a run ran with: code, configuration, environment, machine, person."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mlops_ray.metadata.digest import digest_bytes, digest_json

LOCK_FILE = "requirements.lock"
SOURCE_VARIABLE = "MLOPS_RAY_SOURCE"
_PACKAGES = ("mlops-ray", "ray", "torch", "pyarrow", "numpy", "mlflow", "deltalake", "lmdb")


def collect(folder: Path, config_digest: str, seed: int) -> dict[str, Any]:
    """Describe the present: commit and uncommitted changes of ``folder``, lock, packages, machine.

    Values that cannot be known (no git, no lock file) are None. Digests are BLAKE2b-256.
    """
    return source_state(folder) | {
        "config_digest": config_digest,
        "lock_digest": lock_digest(folder),
        "seed": seed,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "user": _user(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def source_state(folder: Path) -> dict[str, str | None]:
    """Return the commit and the digest of uncommitted changes (``clean`` where there are none).

    A folder that was shipped to a cluster has no git; then ``$MLOPS_RAY_SOURCE`` says what it was.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None and SOURCE_VARIABLE in os.environ:
        told = json.loads(os.environ[SOURCE_VARIABLE])
        return {name: told.get(name) for name in ("commit", "dirty_digest")}
    diff = _git(folder, "diff", "--no-ext-diff", "--binary", "HEAD")
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard")
    return {"commit": commit, "dirty_digest": _dirty_digest(folder, diff, untracked)}


def lock_digest(folder: Path) -> str:
    """Return the digest of the lock file in ``folder``, or else of the installed packages."""
    lock = folder / LOCK_FILE
    if lock.is_file():
        return digest_bytes(lock.read_bytes())
    installed = {
        str(dist.metadata["Name"]).lower(): dist.version
        for dist in metadata.distributions()
        if dist.metadata is not None
    }
    return digest_json(installed)


def _dirty_digest(folder: Path, diff: str | None, untracked: str | None) -> str | None:
    if diff is None:
        return None
    files = {
        name: digest_bytes((folder / name).read_bytes())
        for name in (untracked or "").splitlines()
        if (folder / name).is_file()
    }
    return "clean" if not diff and not files else digest_json({"diff": diff, "untracked": files})


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-c", "core.quotepath=off", *arguments],
            cwd=folder,
            capture_output=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="backslashreplace").strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return None
