"""References in a step's inputs: ``$fit`` is a step's output, ``$gate.passed`` a part of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_REFERENCE = re.compile(r"^\$([A-Za-z_]\w*)((?:\.\w+)*)$")


@dataclass(frozen=True)
class Reference:
    """The output of ``step``, or the part of it that ``path`` leads to."""

    step: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "$" + ".".join((self.step, *self.path))

    def select(self, output: Any) -> Any:
        """Follow ``path`` into a step's output (a JSON value).

        Raises:
            KeyError: The output has no such part.
        """
        for part in self.path:
            if isinstance(output, list) and part.isdigit() and int(part) < len(output):
                output = output[int(part)]
            elif isinstance(output, dict) and part in output:
                output = output[part]
            else:
                raise KeyError(part)
        return output


def parse(value: Any) -> Reference | None:
    """Return the reference that a value is, or None."""
    match = _REFERENCE.match(value) if isinstance(value, str) else None
    return Reference(match[1], tuple(match[2].split(".")[1:])) if match else None


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


def replace(value: Any, resolve: Callable[[Reference], Any]) -> Any:
    """Return ``value`` with every reference replaced by ``resolve(reference)``."""
    reference = parse(value)
    if reference is not None:
        return resolve(reference)
    if isinstance(value, dict):
        return {key: replace(item, resolve) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace(item, resolve) for item in value]
    return value
