"""first version: module level"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mlops_ray.config import signatures
from mlops_ray.metadata.digest import digest_bytes, digest_json


@dataclass(frozen=True)
class Code:
    """The definitions that some names reach, each with its digest, and the digest of them all."""

    symbols: Mapping[str, str]
    digest: str


def code_of(targets: tuple[str, ...], packages: tuple[str, ...]) -> Code:
    start = frozenset(target.rpartition(".")[0] for target in targets)
    symbols = {module: _module_digest(module) for module in sorted(_closure(start, packages))}
    return Code(symbols, digest_json(symbols))


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
