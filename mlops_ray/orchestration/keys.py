"""The key of a step: a digest of its code, its configuration and its inputs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlops_ray.config import signatures
from mlops_ray.metadata.digest import digest_bytes, digest_json


def step_key(target: str, code: str, inputs: Any) -> str:
    """Return the key.

    Args:
        target: The dotted name of the step's function.
        code: The digest of all code that the step runs, see ``code_digest``.
        inputs: The step's inputs, with outputs of other steps replaced by their digests.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return digest_json({"target": target, "code": code, "inputs": inputs, "python": python})


def code_digest(target: str, inputs: Any, packages: Iterable[str]) -> str:
    """Digest the modules that a step reaches by imports inside ``packages``.

    Followed are the imports of the step's own module and of the modules of every dotted name that
    its inputs mention. Comments and formatting do not count; docstrings do.
    """
    allowed = tuple(packages)
    start = {target.rpartition(".")[0]}
    start |= {name.rpartition(".")[0] for name in _dotted_names(inputs, allowed)}
    modules = _closure(frozenset(start), allowed)
    return digest_json({module: _module_digest(module) for module in sorted(modules)})


def _dotted_names(value: Any, packages: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, str):
        if any(value.startswith(f"{package}.") for package in packages) and " " not in value:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _dotted_names(item, packages)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _dotted_names(item, packages)


def _closure(start: frozenset[str], packages: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        file = signatures.module_file(module)
        if file is None:
            continue
        found.add(module)
        waiting += [name for name in _imports(file, module) if _inside(name, packages)]
    return found


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _imports(file: Path, module: str) -> list[str]:
    return _imports_at(file, module, file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _imports_at(file: Path, module: str, _changed_ns: int) -> list[str]:
    names: list[str] = []
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if node.level == 0:
        return node.module or ""
    parent = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parent, *([node.module] if node.module else [])])


def _module_digest(module: str) -> str:
    file = signatures.module_file(module)
    assert file is not None
    return _digest_at(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_at(file: Path, _changed_ns: int) -> str:
    return digest_bytes(ast.unparse(ast.parse(file.read_bytes())).encode())
