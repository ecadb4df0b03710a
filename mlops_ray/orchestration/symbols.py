"""Which definitions a function reaches, found in the source without running it.

What cannot be known is taken along: a module that is used as a value counts whole, and so does one
whose names are made while it runs. Code that is found only by names put together at run time
(``import_module(f"…")``) is not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlops_ray.config import signatures
from mlops_ray.metadata.digest import digest_json
from mlops_ray.orchestration.modules import (
    Chain,
    Import,
    Module,
    Statement,
    chain_of,
    module_of,
)

_WHOLE = "*"
_AT_IMPORT = "<import>"
_QUIET_DECORATORS = frozenset({"mlops_ray.orchestration.marks"})
_RUNS_WHEN_MADE = frozenset({"__init__", "__new__", "__post_init__", "__set_name__"})
_SUBCLASSES = "__subclasses__"
_SEES_SUBCLASSES = frozenset({"__init_subclass__", _SUBCLASSES})

Symbol = tuple[str, str]
"""A module and a name that it binds; ``*`` is all of it."""


@dataclass(frozen=True)
class Code:
    """The definitions that some names reach, each with its digest, and the digest of them all.

    A symbol is a dotted name; ``module.<import>`` are statements that act when it is imported.
    """

    symbols: Mapping[str, str]
    digest: str


@dataclass(frozen=True)
class _Cached:
    code: Code
    stamps: tuple[tuple[Path, tuple[int, int]], ...]


_CACHE: dict[tuple[Any, ...], _Cached] = {}
_MOST_CACHED = 4096


def code_of(targets: tuple[str, ...], packages: tuple[str, ...]) -> Code:
    """Return the code that some dotted names reach inside ``packages``.

    Raises:
        ConfigError: A source file has a syntax error.
    """
    # Where the packages lie is part of the question: the import path may have changed.
    asked = (targets, packages, *(signatures.module_file(package) for package in packages))
    cached = _CACHE.get(asked)
    if cached is not None and all(_stamp(file) == stamp for file, stamp in cached.stamps):
        return cached.code
    closure = _Closure(packages)
    for target in targets:
        closure.start(target)
    closure.run()
    symbols = closure.digests()
    code = Code(symbols, digest_json(symbols))
    if len(_CACHE) >= _MOST_CACHED:
        _CACHE.clear()
    _CACHE[asked] = _Cached(code, tuple((f, _stamp(f)) for f in closure.files()))
    return code


def _stamp(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError:
        return 0, 0
    return state.st_mtime_ns, state.st_size


@dataclass
class _Closure:
    """Everything that is reached so far, and what is still to be looked at."""

    packages: tuple[str, ...]
    modules: dict[str, Module | None] = field(default_factory=dict)
    reached: dict[Symbol, list[Statement]] = field(default_factory=dict)
    seen: set[Symbol] = field(default_factory=set)
    waiting: list[Symbol] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    hooked: set[Symbol] = field(default_factory=set)
    hooks_any: bool = False
    under_way: set[tuple[str, Chain]] = field(default_factory=set)

    def start(self, target: str) -> None:
        """Take a dotted name: a module, or something in one."""
        for package in self.packages:
            if target == package or target.startswith(f"{package}."):
                rest = target[len(package) + 1 :]
                self.waiting += self._follow(package, tuple(rest.split(".")) if rest else ())

    def run(self) -> None:
        """Follow everything that is used until nothing new is found."""
        while self.waiting or self.untouched:
            while self.untouched:
                self._import(self.untouched.pop())
            while self.waiting:
                self._reach(self.waiting.pop())
            self.waiting += self._subclasses()

    def digests(self) -> dict[str, str]:
        """Return the digest of each symbol, sorted by its name."""
        found = {
            f"{module}.{name}": _join(statements)
            for (module, name), statements in self.reached.items()
        }
        return dict(sorted(found.items()))

    def files(self) -> Iterator[Path]:
        """Yield the files and folders whose change may change the result."""
        found = [module.file for module in self.modules.values() if module is not None]
        yield from dict.fromkeys([*found, *(file.parent for file in found)])

    # Names to symbols

    def _module(self, name: str) -> Module | None:
        """Return a module inside the packages; it counts as imported from then on."""
        if name not in self.modules:
            self.modules[name] = module_of(name) if self._inside(name) else None
            if self.modules[name] is not None:
                self.untouched.append(name)
        return self.modules[name]

    def _inside(self, module: str) -> bool:
        return any(module == name or module.startswith(f"{name}.") for name in self.packages)

    def _follow(self, name: str, path: Chain) -> list[Symbol]:
        """Return what a module's attributes of attributes are."""
        module = self._module(name)
        if module is None:
            # A namespace of the project's own may have no file and yet hold modules.
            deeper = path and self._leads_inside(f"{name}.{path[0]}")
            return self._follow(f"{name}.{path[0]}", path[1:]) if deeper else []
        if not path:
            return [(name, _WHOLE)]
        found = self._in_module(module, path)
        if found:
            return found
        if self._module(f"{name}.{path[0]}") is not None:
            return self._follow(f"{name}.{path[0]}", path[1:])
        return [(name, _WHOLE)]

    def _leads_inside(self, name: str) -> bool:
        return any(f"{p}.".startswith(f"{name}.") for p in self.packages) or self._inside(name)

    def _in_module(self, module: Module, path: Chain) -> list[Symbol]:
        """Return what a module binds a name to; [] where that leads back to the same question, as
        ``from . import x`` in a package does: then it is the submodule."""
        asked = (module.name, path)
        if asked in self.under_way:
            return []
        self.under_way.add(asked)
        found = self._bound(module, path)
        self.under_way.remove(asked)
        return found

    def _bound(self, module: Module, path: Chain) -> list[Symbol]:
        name = path[0]
        found: list[Symbol] = [(module.name, name)] if name in module.bound else []
        for origin in module.imports.get(name, ()):
            found += self._imported(origin, path[1:])
        if not found and name not in module.imports:
            for star in module.stars:
                other = self._module(star)
                found += self._in_module(other, path) if other is not None else []
        return found

    def _imported(self, origin: Import, path: Chain) -> list[Symbol]:
        if origin.name is None:
            return self._follow(origin.module, path)
        return self._follow(origin.module, (origin.name, *path))

    def _resolve(self, chain: Chain, statement: Statement, module: Module) -> list[Symbol]:
        """Return what a dotted name inside a statement stands for; [] for what is not ours.

        A name that one function inside imports may be the module's own in another.
        """
        local = statement.imports.get(chain[0], ())
        found = [symbol for origin in local for symbol in self._imported(origin, chain[1:])]
        return found + self._in_module(module, chain)

    # What is reached

    def _reach(self, symbol: Symbol) -> None:
        if symbol in self.seen:
            return
        self.seen.add(symbol)
        module = self._module(symbol[0])
        assert module is not None
        if symbol[1] == _WHOLE:
            self.waiting += [(module.name, name) for name in module.bound]
            for origins in module.imports.values():
                for origin in origins:
                    self.waiting += self._imported(origin, ())
            self._visit((module.name, _AT_IMPORT), module.statements, module, keep=False)
            return
        statements = [*module.bound[symbol[1]], *module.touching(symbol[1])]
        self._visit(symbol, statements, module)

    def _visit(
        self, symbol: Symbol, statements: list[Statement], module: Module, *, keep: bool = True
    ) -> None:
        if keep:
            self.reached.setdefault(symbol, []).extend(statements)
        for statement in statements:
            for chain in statement.uses:
                self.waiting += self._resolve(chain, statement, module)
            self._hook(symbol, statement, module)
            for origins in statement.imports.values():
                self._load(origins)
            for text in statement.texts:
                self._named(text.replace(":", "."), module)

    def _hook(self, symbol: Symbol, statement: Statement, module: Module) -> None:
        """Remember classes whose subclasses are looked up; all, where it cannot be known of which."""
        is_class = isinstance(statement.node, ast.ClassDef)
        if is_class and _methods(statement) & _SEES_SUBCLASSES:
            self.hooked.add(symbol)
        for part in ast.walk(statement.node):
            if isinstance(part, ast.Attribute) and part.attr == _SUBCLASSES:
                chain = chain_of(part.value)
                found = self._resolve(chain, statement, module) if chain is not None else []
                self.hooked |= {symbol, *found}
                self.hooks_any |= not found and not is_class

    def _named(self, text: str, module: Module) -> None:
        """Take along what a text names: a dotted name, or a module beside this one (``.impl``)."""
        if text.startswith("."):
            beside = f"{module.package}{text}"
            if self._is_name(beside) and signatures.module_file(beside) is not None:
                self.start(beside)
        elif self._is_name(text):
            self.start(text)

    def _load(self, origins: list[Import]) -> None:
        for origin in origins:
            parts = origin.module.split(".")
            for length in range(1, len(parts) + 1):
                self._module(".".join(parts[:length]))
            if origin.name is not None:
                self._module(f"{origin.module}.{origin.name}")

    def _is_name(self, text: str) -> bool:
        parts = text.split(".")
        if not all(part.isidentifier() for part in parts) or not self._inside(text):
            return False
        return signatures.module_file(text) is not None or (
            signatures.module_file(".".join(parts[:-1])) is not None
        )

    def _import(self, name: str) -> None:
        """Take along what importing a module does: its imports, and its statements that act."""
        module = self._module(name)
        assert module is not None
        self._load([Import(name)])
        for origins in module.imports.values():
            self._load(origins)
        self._load([Import(star) for star in module.stars])
        acting = [s for s in module.statements if s.has_effect or self._acts(s, module)]
        if acting:
            self._visit((name, _AT_IMPORT), acting, module)

    def _acts(self, statement: Statement, module: Module) -> bool:
        """Say whether a definition calls the project's own code when it is made."""
        for chain in statement.runs:
            for symbol in self._resolve(chain, statement, module):
                if symbol[0] not in _QUIET_DECORATORS and not self._is_quiet(symbol):
                    return True
        return False

    def _is_quiet(self, symbol: Symbol) -> bool:
        """Say whether a symbol is a class whose making runs none of the project's code."""
        module = self._module(symbol[0])
        statements = module.bound.get(symbol[1], []) if module is not None else []
        return bool(statements) and all(
            isinstance(s.node, ast.ClassDef) and not _methods(s) & _RUNS_WHEN_MADE
            for s in statements
        )

    def _subclasses(self) -> list[Symbol]:
        """Return classes that register with a base that is reached, in the modules imported."""
        found: list[Symbol] = []
        hooked = self.hooked | self.seen if self.hooks_any else self.hooked
        for module in [m for m in self.modules.values() if m is not None and hooked]:
            for statement in module.statements:
                if not isinstance(statement.node, ast.ClassDef):
                    continue
                symbol = (module.name, statement.node.name)
                used = {
                    s for chain in statement.uses for s in self._resolve(chain, statement, module)
                }
                if symbol not in self.seen and used & hooked:
                    found.append(symbol)
                    self.hooked.add(symbol)
        return found


def _methods(statement: Statement) -> set[str]:
    body = statement.node.body if isinstance(statement.node, ast.ClassDef) else []
    return {n.name for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}


def _join(statements: list[Statement]) -> str:
    digests = list(dict.fromkeys(statement.digest for statement in statements))
    return digests[0] if len(digests) == 1 else digest_json(digests)[:32]
