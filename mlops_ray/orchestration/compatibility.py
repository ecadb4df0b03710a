"""Whether what one step gives fits what another takes, as far as their annotations tell.

Outputs travel as tables, files or JSON, and pydantic makes them what the annotation says; so a dict
fits a model, an int a float, and what is not known fits everything. A float may be an int, and a
model another one whose fields it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Literal

from mlops_ray.orchestration.annotations import ANYTHING, NOTHING, Annotations, Kind, union, walk

_LISTS = frozenset(
    {
        "list",
        "tuple",
        "set",
        "frozenset",
        "collections.abc.Sequence",
        "collections.abc.Iterable",
        "collections.abc.Collection",
        "collections.abc.MutableSequence",
        "collections.abc.Set",
        "collections.abc.Iterator",
        "collections.abc.Generator",
    }
)
_OBJECTS = frozenset({"dict", "collections.abc.Mapping", "collections.abc.MutableMapping"})
_TABLES = frozenset({"pyarrow.Table", "pyarrow.lib.Table"})
PATHS = frozenset({"pathlib.Path", "pathlib.PurePath", "pathlib.PosixPath", "os.PathLike"})
_SCALARS: dict[str, frozenset[str]] = {
    "bool": frozenset({"bool", "int", "float"}),
    "int": frozenset({"int", "float", "bool"}),
    "float": frozenset({"float"}),
    "str": frozenset({"str", "path"}),
}
_SIMPLE: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "list": list}
_SIMPLE |= {"dict": dict, "None": None}

Fit = Literal["always", "sometimes", "never"]


@dataclass(frozen=True)
class NoPart:
    """A reference selects what is not there: ``part`` of a value of this kind, which has ``known``."""

    kind: Kind
    part: str
    known: tuple[str, ...] = ()


class Compatibility:
    """Judges kinds; classes of the project are looked up in its source."""

    def __init__(self, annotations: Annotations) -> None:
        self._annotations = annotations

    def fit(self, given: Kind, taken: Kind) -> Fit:
        """Say whether values of one kind fit the other: always, some of a union, or never."""
        answers = {self._best(one, taken) for one in given.members()}
        if len(answers) == 1:
            return answers.pop()
        return "sometimes"

    def element(self, kind: Kind) -> Kind | None:
        """Return what a list of this kind holds; None where it is no list."""
        found = [self._element(member) for member in kind.members()]
        known = [element for element in found if element is not None]
        return union(known) if known else None

    def part(self, kind: Kind, path: tuple[str, ...]) -> Kind | NoPart:
        """Return the kind of a part of a value, or what is not there."""
        for index, name in enumerate(path):
            found = [self._part(member, name) for member in kind.members() if member != NOTHING]
            kinds = [part for part in found if isinstance(part, Kind)]
            missing = [part for part in found if isinstance(part, NoPart)]
            if not kinds:
                return missing[0] if missing else NoPart(kind, path[index])
            kind = union(kinds)
        return kind

    def category(self, kind: Kind) -> str:
        """Return how values of a kind travel: table, path, null, a scalar's name, list, object,
        literal; "?" where that is not known."""
        if kind.name in _TABLES:
            return "table"
        if kind.name in PATHS:
            return "path"
        if kind.name in _LISTS:
            return "list"
        if kind.name in _OBJECTS:
            return "object"
        if kind.name in ("None", "Literal", *_SCALARS):
            return {"None": "null", "Literal": "literal"}.get(kind.name, kind.name)
        shape = self._annotations.shape(kind.name)
        return "object" if shape is not None and shape.sort in ("model", "record") else "?"

    def _best(self, given: Kind, taken: Kind) -> Fit:
        answers = {self._fits(given, other) for other in taken.members()}
        return next(fit for fit in ("always", "sometimes", "never") if fit in answers)

    def _fits(self, given: Kind, taken: Kind) -> Fit:
        gives, takes = self.category(given), self.category(taken)
        if gives == "float" and takes == "int" and not taken.refined:
            return "sometimes"  # pydantic takes 3.0 and refuses 3.5
        if gives == takes == "object" and self._might_be(given, taken):
            return "sometimes"
        return "always" if self._surely(given, gives, taken, takes) else "never"

    def _surely(self, given: Kind, gives: str, taken: Kind, takes: str) -> bool:
        if "?" in (gives, takes) or taken.refined:
            return True
        if "literal" in (gives, takes):
            return _literal_fits(given, gives, taken, takes)
        if gives in _SCALARS:
            return takes in _SCALARS[gives]
        if gives == takes == "list":
            return self._lists_fit(given, taken)
        if gives == takes == "object":
            return self._objects_fit(given, taken)
        return gives == takes or self._converts(taken)

    def _converts(self, taken: Kind) -> bool:
        shape = self._annotations.shape(taken.name)
        return shape is not None and shape.converts

    def _lists_fit(self, given: Kind, taken: Kind) -> bool:
        gives, takes = self._element(given), self._element(taken)
        return gives is None or takes is None or self.fit(gives, takes) != "never"

    def _objects_fit(self, given: Kind, taken: Kind) -> bool:
        if given.name in _OBJECTS and taken.name in _OBJECTS:
            pairs = list(zip(given.arguments, taken.arguments, strict=False))
            return all(self.fit(one, other) != "never" for one, other in pairs)
        if given.name in _OBJECTS or taken.name in _OBJECTS or self._converts(taken):
            return True
        shape = self._annotations.shape(given.name)
        bases = shape.bases if shape is not None else frozenset()
        if "typing.TypedDict" in bases:
            return True  # which is a dict by another name
        same = given.name.rpartition(".")[2] == taken.name.rpartition(".")[2]
        return same or taken.name in bases

    def _might_be(self, given: Kind, taken: Kind) -> bool:
        """Say whether an unrelated model has all that another one needs."""
        gives, takes = self._annotations.shape(given.name), self._annotations.shape(taken.name)
        if gives is None or takes is None or self._objects_fit(given, taken):
            return False
        shared = gives.fields.keys() & takes.fields.keys()
        return takes.required <= shared != set() and all(
            self.fit(gives.fields[name], takes.fields[name]) != "never" for name in shared
        )

    def _element(self, kind: Kind) -> Kind | None:
        category = self.category(kind)
        if category == "?":
            return ANYTHING
        if category != "list":
            return None
        inside = [argument for argument in kind.arguments if argument.name != "..."]
        return union(inside) if inside else ANYTHING

    def _part(self, kind: Kind, name: str) -> Kind | NoPart:
        category = self.category(kind)
        if category == "?":
            return ANYTHING
        if category == "list":
            return self._at(kind, name)
        shape = self._annotations.shape(kind.name)
        if category != "object":
            return NoPart(kind, name)
        if shape is None:
            return kind.arguments[1] if len(kind.arguments) == 2 else ANYTHING
        if name in shape.fields:
            return shape.fields[name]
        return ANYTHING if shape.is_open else NoPart(kind, name, tuple(shape.fields))

    def _at(self, kind: Kind, name: str) -> Kind | NoPart:
        if not name.isdecimal():
            return NoPart(kind, name)
        if kind.name != "tuple" or not kind.arguments or Kind("...") in kind.arguments:
            return self._element(kind) or ANYTHING
        return kind.arguments[int(name)] if int(name) < len(kind.arguments) else NoPart(kind, name)


def simple_type(kind: Kind) -> Any:
    """Return the Python type of an annotation that is made of plain types only, else ``Any``."""
    if any(part.name not in (*_SIMPLE, "|", "Literal") or part.refined for part in walk(kind)):
        return Any
    if kind.name == "|":
        return reduce(or_, map(simple_type, kind.arguments))
    if kind.name == "Literal":
        return Literal[kind.values]
    base = _SIMPLE[kind.name]
    return base[tuple(map(simple_type, kind.arguments))] if kind.arguments else base


def paths_in(value: Any, taken: Kind) -> Iterator[str]:
    """Yield the texts inside a value that a parameter of this kind takes as paths."""
    if not any(part.name in PATHS for part in walk(taken)):
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from paths_in(item, taken)


def _literal_fits(given: Kind, gives: str, taken: Kind, takes: str) -> bool:
    if gives == takes:
        return bool(set(given.values) & set(taken.values))
    if takes == "literal":
        return gives in {_scalar(value) for value in taken.values}
    return any(takes in _SCALARS.get(_scalar(value), {_scalar(value)}) for value in given.values)


def _scalar(value: object) -> str:
    return "null" if value is None else type(value).__name__
