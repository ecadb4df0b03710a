"""Annotations of step functions, read from source: what a step gives and what it takes."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlops_ray.config import signatures
from mlops_ray.orchestration.modules import Import, Module, chain_of, imports_of, module_of

_WRAPPERS = frozenset({"typing.Annotated", "typing.Final", "typing.Required", "typing.NotRequired"})
_ALIASES = {
    "typing.List": "list",
    "typing.Dict": "dict",
    "typing.Tuple": "tuple",
    "typing.Set": "set",
    "typing.FrozenSet": "frozenset",
    "typing.Sequence": "collections.abc.Sequence",
    "typing.Iterable": "collections.abc.Iterable",
    "typing.Mapping": "collections.abc.Mapping",
    "typing.Text": "str",
}
_MODELS = {
    "pydantic.BaseModel": "model",
    "pydantic.main.BaseModel": "model",
    "typing.NamedTuple": "record",
    "typing.TypedDict": "record",
    "typing_extensions.TypedDict": "record",
    "enum.Enum": "enum",
    "enum.StrEnum": "enum",
    "enum.IntEnum": "enum",
}
_RENAMING = frozenset({"alias", "serialization_alias", "alias_generator"})
_DEEPEST = 20


@dataclass(frozen=True)
class Kind:
    """A type: a canonical dotted name (``int``, ``pyarrow.Table``, ``flights.data.Report``) and its
    arguments. ``?`` is anything, ``|`` a union, ``None`` nothing, ``Literal`` has ``values``.

    ``refined`` says that validators may make it of other values than the type itself would take.
    """

    name: str
    arguments: tuple[Kind, ...] = ()
    values: tuple[object, ...] = ()
    refined: bool = False

    def __str__(self) -> str:
        if self.name == "|":
            return " | ".join(map(str, self.arguments))
        if self.name == "Literal":
            return f"Literal[{', '.join(map(repr, self.values))}]"
        short = {"?": "Any"}.get(self.name, self.name.rpartition(".")[2])
        return f"{short}[{', '.join(map(str, self.arguments))}]" if self.arguments else short

    def members(self) -> tuple[Kind, ...]:
        """Return what a union is made of, else the kind itself."""
        return self.arguments if self.name == "|" else (self,)


ANYTHING = Kind("?")
NOTHING = Kind("None")


@dataclass(frozen=True)
class Shape:
    """What is known of a class: what sort it is (model, record, enum, plain), its fields, its bases.

    ``required`` are the fields without a default; ``is_open``: there may be more fields than these;
    ``converts``: it is made of other values, too.
    """

    sort: str
    fields: dict[str, Kind]
    bases: frozenset[str]
    is_open: bool
    converts: bool
    required: frozenset[str] = frozenset()


class Annotations:
    """Reads annotations in the source of some packages, as it is when each module is first asked for;
    all else is known by its name alone."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages
        self._shapes: dict[str, Shape | None] = {}
        self._modules: dict[str, Module | None] = {}

    def gives(self, signature: signatures.Signature) -> Kind:
        """Return what a function returns."""
        node, module = signature.node, self._module(signature.module)
        if module is None or not isinstance(node, ast.FunctionDef):
            return ANYTHING
        return self._read(node.returns, module) if node.returns is not None else ANYTHING

    def takes(self, signature: signatures.Signature, parameter: str) -> Kind:
        """Return what a function takes for a parameter."""
        node, module = signature.node, self._module(signature.module)
        if module is None or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return ANYTHING
        arguments = node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if argument.arg == parameter and argument.annotation is not None:
                return self._read(argument.annotation, module)
        return ANYTHING

    def decorators(self, signature: signatures.Signature) -> frozenset[str]:
        """Return the canonical names of a function's decorators."""
        node, module = signature.node, self._module(signature.module)
        if module is None or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return frozenset()
        chains = (chain_of(_callee(decorator)) for decorator in node.decorator_list)
        return frozenset(self._name(chain, module) for chain in chains)

    def calls(self, signature: signatures.Signature) -> Iterator[tuple[str, int]]:
        """Yield the canonical name and the line of each call in a function's body; of a method of a
        value that is not known, the name is ``?.method``."""
        node, module = signature.node, self._module(signature.module)
        if module is None or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        local = imports_of(node, module.package)
        inside = replace(module, imports={**module.imports, **local})
        for part in ast.walk(node):
            if isinstance(part, ast.Call):
                chain = chain_of(part.func)
                last = part.func.attr if isinstance(part.func, ast.Attribute) else ""
                yield self._name(chain, inside) or f"?.{last}", part.lineno

    def shape(self, name: str) -> Shape | None:
        """Return what is known of a class of the packages; None for all else."""
        if name not in self._shapes:
            self._shapes[name] = None  # a class that mentions itself
            self._shapes[name] = self._shape(name)
        return self._shapes[name]

    def _shape(self, name: str) -> Shape | None:
        place, _, last = name.rpartition(".")
        module = self._module(place) if place and self._inside(place) else None
        if module is None:
            return None
        nodes = [s.node for s in module.bound.get(last, ()) if isinstance(s.node, ast.ClassDef)]
        return self._shape_of(nodes[-1], module) if nodes else None

    def _shape_of(self, node: ast.ClassDef, module: Module) -> Shape:
        sort, is_open = "plain", False
        fields: dict[str, Kind] = {}
        required: set[str] = set()
        bases: set[str] = set()
        for base in node.bases:
            name = self._read(base, module).name
            known = self.shape(name)
            bases |= {name} | (known.bases if known else set())
            fields |= known.fields if known else {}
            required |= known.required if known else set()
            sort = _MODELS.get(name) or (known.sort if known and known.sort != "plain" else sort)
            is_open |= (
                known.is_open if known else name not in (*_MODELS, "object", "typing.Generic")
            )
        decorators = [self._name(chain_of(_callee(d)), module) for d in node.decorator_list]
        if any(name.endswith("dataclass") for name in decorators):
            sort = "record"
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                kind = self._read(item.annotation, module)
                if not item.target.id.startswith("_") and kind.name != "typing.ClassVar":
                    fields[item.target.id] = kind
                    (required.discard if item.value else required.add)(item.target.id)
        shapes = [shape for shape in map(self.shape, bases) if shape is not None]
        converts = _converts(node) or any(shape.converts for shape in shapes)
        is_open |= _renames(node)
        return Shape(sort, fields, frozenset(bases), is_open, converts, frozenset(required))

    def _read(self, node: ast.expr, module: Module, depth: int = 0) -> Kind:
        if depth > _DEEPEST:
            return ANYTHING
        if isinstance(node, ast.Constant):
            return self._constant(node.value, module, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [self._read(side, module, depth + 1) for side in (node.left, node.right)]
            return union(sides)
        if isinstance(node, ast.Subscript):
            return self._generic(node, module, depth)
        chain = chain_of(node)
        return self._named(chain, module, depth) if chain is not None else ANYTHING

    def _constant(self, value: object, module: Module, depth: int) -> Kind:
        if value is None:
            return NOTHING
        if isinstance(value, str):
            try:
                return self._read(ast.parse(value, mode="eval").body, module, depth + 1)
            except SyntaxError:
                return ANYTHING
        return ANYTHING

    def _generic(self, node: ast.Subscript, module: Module, depth: int) -> Kind:
        base = self._read(node.value, module, depth + 1)
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if base.name == "typing.Literal":
            values = tuple(item.value for item in inside if isinstance(item, ast.Constant))
            return Kind("Literal", values=values) if len(values) == len(inside) else ANYTHING
        if base.name == "typing.ClassVar":
            return base
        arguments = tuple(
            Kind("...")
            if isinstance(item, ast.Constant) and item.value is Ellipsis
            else self._read(item, module, depth + 1)
            for item in inside
        )
        if base.name in _WRAPPERS:
            first = arguments[0]
            return Kind(first.name, first.arguments, first.values, base.name == "typing.Annotated")
        if base.name == "typing.Optional":
            return union([*arguments, NOTHING])
        if base.name == "typing.Union":
            return union(list(arguments))
        return Kind(base.name, arguments) if base is not ANYTHING else ANYTHING

    def _named(self, chain: tuple[str, ...], module: Module, depth: int) -> Kind:
        alias = self._alias(chain, module)
        if alias is not None:
            return self._read(*alias, depth + 1)
        name = self._name(chain, module)
        name = _ALIASES.get(name, name)
        return ANYTHING if name in ("typing.Any", "object", "") else Kind(name)

    def _alias(self, chain: tuple[str, ...], module: Module) -> tuple[ast.expr, Module] | None:
        """Return the expression that a name of ours is only another word for."""
        place, last = self._place(chain, module)
        if place is None:
            return None
        for statement in place.bound.get(last, ()):
            node = statement.node
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                return node.value, place
        return None

    def _name(self, chain: tuple[str, ...] | None, module: Module) -> str:
        """Return the canonical dotted name; "" for what cannot be known."""
        if chain is None:
            return ""
        place, last = self._place(chain, module)
        if place is not None:
            return f"{place.name}.{last}"
        for origin in module.imports.get(chain[0], ()):
            return ".".join([origin.module, *([origin.name] if origin.name else []), *chain[1:]])
        if chain[0] in module.bound:
            return ""
        return chain[0] if len(chain) == 1 and hasattr(builtins, chain[0]) else ""

    def _place(self, chain: tuple[str, ...], module: Module) -> tuple[Module | None, str]:
        """Return the module of ours that binds a name, and the name there."""
        for _ in range(_DEEPEST):
            if len(chain) == 1 and chain[0] in module.bound:
                return module, chain[0]
            origin = next(iter(module.imports.get(chain[0], ())), None)
            path = _path(origin, chain[1:]) if origin is not None else ()
            found = self._deepest(path)
            if found is None or not found[1]:
                return None, ""
            module, chain = found
        return None, ""

    def _deepest(self, path: tuple[str, ...]) -> tuple[Module, tuple[str, ...]] | None:
        """Split a dotted path into the module of ours that it leads to and the rest."""
        for length in range(len(path) - 1, 0, -1):
            name = ".".join(path[:length])
            module = self._module(name) if self._inside(name) else None
            if module is not None:
                return module, path[length:]
        return None

    def _module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = module_of(name)
        return self._modules[name]

    def _inside(self, module: str) -> bool:
        return any(module == name or module.startswith(f"{name}.") for name in self._packages)


def union(kinds: list[Kind]) -> Kind:
    """Return the union of kinds; anything with anything is anything."""
    members: list[Kind] = []
    for kind in kinds:
        members += [member for member in kind.members() if member not in members]
    if ANYTHING in members:
        return ANYTHING
    return members[0] if len(members) == 1 else Kind("|", tuple(members))


def _path(origin: Import, rest: tuple[str, ...]) -> tuple[str, ...]:
    named = (origin.name,) if origin.name is not None else ()
    return (*origin.module.split("."), *named, *rest)


def _callee(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node


def _renames(node: ast.ClassDef) -> bool:
    """Say whether a model's JSON may have other names than its fields."""
    calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
    words = {(k.arg, ast.unparse(k.value)) for call in calls for k in call.keywords}
    if any(name in _RENAMING or (name, value) == ("extra", "'allow'") for name, value in words):
        return True
    return any("computed_field" in ast.unparse(item) for item in node.body)


def _converts(node: ast.ClassDef) -> bool:
    """Say whether a model takes more than an object with its fields."""
    words = ("model_validator", "__get_pydantic_core_schema__", "__get_validators__")
    return any(word in ast.unparse(item) for item in node.body for word in words)


def walk(kind: Kind) -> Iterator[Kind]:
    """Yield a kind and all kinds inside it."""
    yield kind
    for argument in kind.arguments:
        yield from walk(argument)
