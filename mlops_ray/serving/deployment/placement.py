"""How code reaches replicas: which folders they import from, and the Ray runtime environment."""

from __future__ import annotations

import importlib.util
import os
import site
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlops_ray.errors import ServingError

# What a Ray job brings besides environment variables; replicas outlive the job and need it too.
_SHIPPED = ("working_dir", "py_modules", "pip", "uv", "conda")


def roots_of(targets: Iterable[str]) -> list[Path]:
    """Return the folders to import ``targets`` (dotted names) and this package from, sorted.

    Installed packages need none. ServingError where a package is not importable here.
    """
    packages = {"mlops_ray", *(target.partition(".")[0] for target in targets)}
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), *_library_folders())}
    return sorted({root for name in packages if (root := _root(name)) not in installed})


def runtime_environment(roots: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    """Return a Ray runtime environment for replicas, and the roots as seen from there.

    Inside a Ray job that shipped a working directory, replicas share that directory: a root in it is
    given relative to it. All others are paths that every node must have.
    """
    import ray

    job = dict(ray.get_runtime_context().runtime_env)
    environment = {key: job[key] for key in _SHIPPED if job.get(key)}
    shipped = Path.cwd().resolve() if "working_dir" in environment else None
    relative = [
        os.path.relpath(root, shipped) if shipped and root.is_relative_to(shipped) else str(root)
        for root in roots
    ]
    absolute = [root for root in relative if os.path.isabs(root)]
    if absolute:
        environment["env_vars"] = {"PYTHONPATH": os.pathsep.join(absolute)}
    return environment, relative


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        raise ServingError(
            f"package {package} cannot be imported",
            fix="put its folder on PYTHONPATH, or install it",
        )
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return Path(str(spec.origin)).resolve().parent


def _library_folders() -> list[str]:
    return [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")]
