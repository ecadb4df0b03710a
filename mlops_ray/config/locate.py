"""Where configuration files and project code lie: the base configs and the project folders."""

from __future__ import annotations

import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from mlops_ray.errors import ConfigError, Problem

FOLDER = ".mlops-ray"


@dataclass(frozen=True)
class Workspace:
    """A working directory and the project folders that it declares.

    ``projects`` are the folders that hold ``configs/`` and the project's Python packages.
    """

    directory: Path
    projects: tuple[Path, ...]

    @property
    def search_path(self) -> tuple[Path, ...]:
        """Config folders, in Hydra's order: a project's file hides a base file of that name."""
        own = [p / "configs" for p in (self.directory, *self.projects) if (p / "configs").is_dir()]
        return tuple(dict.fromkeys([*own, base_configs()]))

    def import_roots(self) -> None:
        """Put the project folders on this process's import path."""
        for project in reversed(self.projects):
            if str(project) not in sys.path:
                sys.path.insert(0, str(project))


def open_workspace(directory: Path) -> Workspace:
    """Read the workspace at ``directory``.

    ``pyproject.toml`` may name project folders: ``[tool.mlops-ray] projects = ["examples/flights"]``.
    Without it the directory itself is the project.

    Raises:
        ConfigError: The file cannot be parsed, or names a folder that is not there.
    """
    directory = directory.absolute()
    names = _declared(directory / "pyproject.toml")
    projects = tuple((directory / name).resolve() for name in names)
    missing = [str(path) for path in projects if not path.is_dir()]
    if missing:
        raise ConfigError(
            [
                Problem("tool.mlops-ray.projects", f"{path} is not a folder.", "pyproject.toml")
                for path in missing
            ]
        )
    return Workspace(directory, projects)


def default_home() -> Path:
    """Return ``$MLOPS_RAY_HOME``, else ``~/.mlops-ray`` inside a Ray job, else ``./.mlops-ray``.

    A Ray job's working directory is a throw-away copy, so nothing that should last may go there.
    """
    if "MLOPS_RAY_HOME" in os.environ:
        return Path(os.environ["MLOPS_RAY_HOME"]).expanduser().absolute()
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return Path.home() / FOLDER
    return Path.cwd() / FOLDER


def base_configs() -> Path:
    """Return the folder of the configs that come with the package."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _declared(file: Path) -> list[str]:
    if not file.is_file():
        return ["."]
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([Problem("pyproject.toml", str(error), "pyproject.toml")]) from error
    names = content.get("tool", {}).get("mlops-ray", {}).get("projects", ["."])
    if not isinstance(names, list):
        hint = 'Write for example projects = ["."].'
        raise ConfigError(
            [
                Problem(
                    "tool.mlops-ray.projects", "expected a list of folders.", file.name, hint=hint
                )
            ]
        )
    return [str(name) for name in names]
