"""What a dotted name takes as arguments, read from its source without running it.

``check`` and ``plan`` look at user code and at heavy modules (torch) through this, so that they are
quick and have no side effects.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from mlops_ray.errors import ConfigError, Problem

_HARMLESS = frozenset({"effect", "ensure", "cache", "lru_cache"})


@dataclass(frozen=True)
class Signature:
    """Parameters of a function or of a class's constructor, without ``self``.

    ``required`` is empty where a decorator may give some; ``open`` says that further keyword
    arguments are taken, or that they cannot be known;
    ``never_none`` are the parameters whose annotation leaves no room for None. ``node`` is the
    definition, ``module`` where it is.
    """

    file: Path
    line: int
    parameters: tuple[str, ...]
    required: frozenset[str]
    open: bool = False
    never_none: frozenset[str] = frozenset()
    module: str = ""
    node: ast.AST | None = field(default=None, repr=False, compare=False)


def find(target: str) -> Signature | None:
    """Return the signature of ``package.module.name``, or None when there is no such thing."""
    module, _, name = target.rpartition(".")
    file = module_file(module)
    if file is None:
        return None
    for node in _top(tree(file).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return _of_function(node, file, module)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node, file, module)
        if isinstance(node, ast.ImportFrom) and (origin := _origin(node, name, module)):
            return find(origin)
        if _assigns(node, name):
            return Signature(file, node.lineno, (), frozenset(), open=True, module=module)
    return None


def names(module: str) -> list[str]:
    """Return the public functions and classes that a module defines; [] when it has no source."""
    file = module_file(module)
    if file is None:
        return []
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    body = _top(tree(file).body)
    return [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")]


def module_file(module: str) -> Path | None:
    """Return the source file of a module, or None. Runs no code, not even a package's __init__."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder, *rest)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


@lru_cache(maxsize=2048)
def _parse_at(file: Path, _changed_ns: int) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        problem = Problem("syntax", f"{error.msg}.", str(file), error.lineno)
        raise ConfigError([problem]) from error


def tree(file: Path) -> ast.Module:
    """Return the syntax tree of a source file; cached until the file changes.

    Raises:
        ConfigError: The source has a syntax error.
    """
    return _parse_at(file, file.stat().st_mtime_ns)


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run at import, also those inside ``if``, ``try`` and ``with``."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _top(node.body)
            for handler in node.handlers if isinstance(node, ast.Try) else ():
                yield from _top(handler.body)
            if not isinstance(node, ast.With):
                yield from _top(node.orelse)
            if isinstance(node, ast.Try):
                yield from _top(node.finalbody)
        else:
            yield node


def _of_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, file: Path, module: str
) -> Signature:
    arguments = node.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    without_default = len(positional) - len(arguments.defaults)
    required = set(positional[:without_default])
    keyword = [a.arg for a in arguments.kwonlyargs]
    required |= {
        name
        for name, default in zip(keyword, arguments.kw_defaults, strict=True)
        if default is None
    }
    parameters = [name for name in positional + keyword if name not in ("self", "cls")]
    return Signature(
        file,
        node.lineno,
        tuple(parameters),
        frozenset(required - {"self", "cls"}) if _is_plain(node) else frozenset(),
        open=arguments.kwarg is not None,
        never_none=frozenset(
            argument.arg
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            if argument.annotation is not None and _excludes_none(ast.unparse(argument.annotation))
        ),
        module=module,
        node=node,
    )


def _is_plain(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Say whether no decorator can give an argument that the caller does not."""
    words = (ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list)
    return all(word.rpartition(".")[2] in _HARMLESS for word in words)


def _excludes_none(annotation: str) -> bool:
    return not any(word in annotation for word in ("None", "Optional", "Any", "object"))


def _of_class(node: ast.ClassDef, file: Path, module: str) -> Signature:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return replace(_of_function(member, file, module), node=node)
    return Signature(file, node.lineno, (), frozenset(), open=True, module=module, node=node)


def _origin(node: ast.ImportFrom, name: str, module: str) -> str | None:
    """Return where a name comes from that a module imports from its own package, else None.

    What it imports from elsewhere does not become its own: allowing a package must not allow all
    that the package happens to import.
    """
    top = module.split(".")[0]
    base = node.module or ""
    if node.level:
        base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
    if base.split(".")[0] != top:
        return None
    for alias in node.names:
        if (alias.asname or alias.name) == name:
            return f"{base}.{alias.name}"
    return None


def _assigns(node: ast.stmt, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(t, ast.Name) and t.id == name for t in targets)
