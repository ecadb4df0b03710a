"""Dotted names to the things that they name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from mlops_ray.errors import MlopsRayError

_ALLOWED: list[str] = []


def allow(packages: Iterable[str]) -> None:
    """From now on, ``load`` in this process only loads from these packages."""
    _ALLOWED[:] = packages


def allowed() -> tuple[str, ...]:
    """Return the packages that ``load`` loads from in this process; none where it may from all."""
    return tuple(_ALLOWED)


def load(target: str) -> Any:
    """Import and return what ``package.module.name`` names.

    Raises:
        MlopsRayError: The name is not in an allowed package, where ``allow`` has named any; or its
            module is not on the import path, fails while it is imported, or has no such name.
    """
    if _ALLOWED and not any(target.startswith(f"{package}.") for package in _ALLOWED):
        raise MlopsRayError(
            f"{target!r} is not on the allow-list",
            fix=f"allowed are: {', '.join(_ALLOWED)}; add its package to 'allow' to trust it",
        )
    module_name, _, name = target.rpartition(".")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        own = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        raise MlopsRayError(
            f"there is no module {error.name!r}",
            where=target,
            why="it is not on the import path" if own else f"{module_name} imports it",
            fix="check the spelling, and that the project's folder is named in pyproject.toml"
            if own
            else f"install the package that has {error.name!r}",
        ) from error
    except Exception as error:
        raise MlopsRayError(
            f"the module {module_name!r} cannot be imported",
            where=target,
            why=f"{type(error).__name__}: {error}",
            fix="import it in a Python shell to see the whole error",
        ) from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise MlopsRayError(
            f"the module {module_name!r} has no {name!r}",
            where=target,
            fix=f"names in it: {', '.join(n for n in vars(module) if not n.startswith('_'))}",
        ) from error
