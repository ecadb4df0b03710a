"""Modules as their source shows them: what each statement binds, uses, and does when imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from mlops_ray.config import signatures
from mlops_ray.metadata.digest import digest_bytes

Chain = tuple[str, ...]
"""A dotted use: ``maths.f.x`` is ``("maths", "f", "x")``."""

LOADED = ""
STAR = "*"
_COMPLETE = "model_rebuild"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)


@dataclass(frozen=True)
class Import:
    """What an import binds: a module, or a name in one."""

    module: str
    name: str | None = None


@dataclass
class Statement:
    """One statement at the top of a module, or inside an ``if`` or ``try`` there."""

    node: ast.stmt
    package: str
    binds: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Digest of the code: neither comments nor formatting count."""
        return digest_bytes(ast.unparse(self.node).encode())[:32]

    @cached_property
    def uses(self) -> frozenset[Chain]:
        """Names and dotted names that are read anywhere inside, also in annotations."""
        return frozenset(_chains(self.node))

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """What import statements inside functions bind."""
        return imports_of(self.node, self.package)

    @cached_property
    def texts(self) -> frozenset[str]:
        """Texts inside that could be dotted names."""
        found = (n.value for n in ast.walk(self.node) if isinstance(n, ast.Constant))
        return frozenset(t for t in found if isinstance(t, str) and "." in t and t.isascii())

    @cached_property
    def runs(self) -> frozenset[Chain]:
        """What is called when the module is imported: also decorators, and those of methods."""
        return frozenset(_called(self.node))

    @property
    def has_effect(self) -> bool:
        """Whether it does more at import than to bind names, whatever it calls."""
        return _has_effect(self.node)


@dataclass
class Module:
    """A module's statements, by the names that they bind, and its imports."""

    name: str
    file: Path
    package: str
    statements: list[Statement] = field(default_factory=list)
    bound: dict[str, list[Statement]] = field(default_factory=dict)
    imports: dict[str, list[Import]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def touching(self, name: str) -> Iterator[Statement]:
        """Yield statements that may change what a name of the module stands for: they hand a
        variable to something that they call, decorate with it, or complete a pydantic model."""
        is_defined = any(isinstance(s.node, _DEFINITIONS) for s in self.bound.get(name, ()))
        for statement in self.statements:
            completes = _completes(statement.node) == (name, _COMPLETE)
            hands_over = not is_defined and _hands_over(statement.node, name)
            if name not in statement.binds and (completes or hands_over):
                yield statement


def module_of(name: str) -> Module | None:
    """Read a module; None where there is no source. Cached until its file changes.

    Raises:
        ConfigError: The source has a syntax error.
    """
    file = signatures.module_file(name)
    if file is None:
        return None
    state = file.stat()
    return _module_at(name, file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2048)
def _module_at(name: str, file: Path, _changed_ns: int, _size: int) -> Module:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    module = Module(name, file, package)
    for node in _top(signatures.tree(file).body):
        for bound, origins in imports_of(node, package, nested=False).items():
            if bound == STAR:
                module.stars += [origin.module for origin in origins]
            else:
                module.imports.setdefault(bound, []).extend(origins)
        statement = Statement(node, package, tuple(dict.fromkeys(_binds(node))))
        if not isinstance(node, ast.Import | ast.ImportFrom):
            module.statements.append(statement)
        for bound in statement.binds:
            module.bound.setdefault(bound, []).append(statement)
    return module


def imports_of(node: ast.AST, package: str, *, nested: bool = True) -> dict[str, list[Import]]:
    """Return what the imports inside a statement bind; ``*`` are star imports, ``LOADED`` modules
    that are imported whatever of them is bound.

    Without ``nested`` those inside functions and classes are left out.
    """
    found: dict[str, list[Import]] = {}
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if isinstance(item, ast.Import):
            for alias in item.names:
                name = alias.asname or alias.name.partition(".")[0]
                target = alias.name if alias.asname else name
                found.setdefault(name, []).append(Import(target))
                found.setdefault(LOADED, []).append(Import(alias.name))
        elif isinstance(item, ast.ImportFrom):
            base = absolute(item, package)
            for alias in item.names:
                origin = Import(base, None if alias.name == STAR else alias.name)
                found.setdefault(alias.asname or alias.name, []).append(origin)
        elif nested or not isinstance(item, _DEFINITIONS):
            waiting += ast.iter_child_nodes(item)
    return found


def absolute(node: ast.ImportFrom, package: str) -> str:
    """Return the module that ``from … import`` names, seen from a package."""
    if node.level == 0:
        return node.module or ""
    parent = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parent, *([node.module] if node.module else [])])


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield what a module runs when it is imported; not what it runs only as a program."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            yield from _top(node.orelse)
        else:
            yield node


def _binds(node: ast.AST) -> Iterator[str]:
    """Yield the names that a statement binds in the module, apart from imports."""
    if isinstance(node, _DEFINITIONS):
        yield node.name
        return
    if isinstance(node, ast.Lambda | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _binds(child)


def _chains(node: ast.AST) -> Iterator[Chain]:
    waiting: list[ast.AST] = [node]
    while waiting:
        item = waiting.pop()
        chain = chain_of(item)
        if chain is not None:
            yield chain
            continue
        waiting += ast.iter_child_nodes(item)
        for text in _annotations(item):
            waiting.append(text)


def chain_of(node: ast.AST) -> Chain | None:
    """Return the dotted name that an expression is, or None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else None


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    """Yield annotations that are written as text."""
    given = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    for annotation in given:
        if annotation is None:
            continue
        for part in ast.walk(annotation):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                try:
                    yield ast.parse(part.value, mode="eval").body
                except SyntaxError:
                    continue


def _called(node: ast.AST) -> Iterator[Chain]:
    inside: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, _DEFINITIONS):
        inside = list(node.decorator_list)
        yield from (chain for chain in map(chain_of, node.decorator_list) if chain is not None)
        if isinstance(node, ast.ClassDef):
            inside += [*node.body, *node.bases, *node.keywords]
    elif isinstance(node, ast.Lambda):
        return
    elif isinstance(node, ast.Call) and (called := chain_of(node.func)) is not None:
        yield called
    for item in inside:
        yield from _called(item)


def _has_effect(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant) and _completes(node) is None
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        parts = [part for target in targets for part in ast.walk(target)]
        if any(isinstance(part, ast.Name) and part.id == "_" for part in parts):
            return True  # whose value nobody wants
        return any(isinstance(part, ast.Attribute | ast.Subscript) for part in parts)
    if isinstance(node, ast.ClassDef):
        return bool(node.keywords)
    if isinstance(node, ast.If):
        return any(_has_effect(child) for child in (*node.body, *node.orelse))
    if isinstance(node, ast.Try):
        children = [*node.body, *node.orelse, *node.finalbody]
        children += [child for handler in node.handlers for child in handler.body]
        return any(_has_effect(child) for child in children)
    quiet = (*_FUNCTIONS, ast.Import, ast.ImportFrom, ast.Pass)
    return not isinstance(node, quiet) and type(node).__name__ != "TypeAlias"


def _completes(node: ast.stmt) -> Chain | None:
    """Return ``(model, "model_rebuild")`` where a statement only does that."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return None
    chain = chain_of(node.value.func)
    return chain if chain is not None and chain[1:] == (_COMPLETE,) else None


def _hands_over(node: ast.stmt, name: str) -> bool:
    if isinstance(node, _DEFINITIONS):
        return any(chain[0] == name for d in node.decorator_list for chain in _chains(d))
    calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
    return any(chain[0] == name for call in calls for chain in _chains(call))
