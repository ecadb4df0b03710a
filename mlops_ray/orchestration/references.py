"""References in a step's inputs: ``$fit`` is a step's output, ``$gate.passed`` a part of one.

Text that begins with ``$`` and a letter is written with ``$$``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

NAME = r"[A-Za-z_]\w*"
_BEGINS = re.compile(r"\$[^\W\d]")
_REFERENCE = re.compile(rf"\$({NAME}(?:/{NAME})*)((?:\.\w+)*)")


@dataclass(frozen=True)
class Reference:
    """The output of ``step``, or the part of it that ``path`` leads to.

    A step of a nested workflow is named ``outer/inner`` once the workflow is flattened.
    """

    step: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "$" + ".".join((self.step, *self.path))

    def select(self, output: Any) -> Any:
        """Follow ``path`` into a step's output (a JSON value).

        Raises:
            KeyError: The output has no such part.
        """
        return select(output, self.path)


def select(value: Any, path: tuple[str, ...]) -> Any:
    """Follow a path of keys and positions into a JSON value.

    Raises:
        KeyError: There is no such part; holds the first name that leads nowhere.
    """
    for part in path:
        if isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise KeyError(part)
    return value


def parse(value: Any) -> Reference | None:
    """Return the reference that a value is, or None."""
    match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return Reference(match[1], tuple(match[2].split(".")[1:])) if match else None


def is_mistaken(value: Any) -> bool:
    """Say whether a value begins as a reference does and yet is none."""
    return isinstance(value, str) and _BEGINS.match(value) is not None and parse(value) is None


def find(value: Any) -> Iterator[Reference]:
    """Yield all references inside a value, in order."""
    reference = parse(value)
    if reference is not None:
        yield reference
    elif isinstance(value, dict):
        for item in value.values():
            yield from find(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find(item)


def replace(value: Any, resolve: Callable[[Reference], Any], *, keep_escapes: bool = False) -> Any:
    """Return ``value`` with every reference replaced by ``resolve(reference)``, and ``$$`` at the
    beginning of a text by ``$``, unless ``keep_escapes``."""
    reference = parse(value)
    if reference is not None:
        return resolve(reference)
    if isinstance(value, dict):
        return {k: replace(v, resolve, keep_escapes=keep_escapes) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace(item, resolve, keep_escapes=keep_escapes) for item in value]
    escaped = isinstance(value, str) and value.startswith("$$") and not keep_escapes
    return value[1:] if escaped else value
