"""How a request is refused: what is wrong, in which field, in which row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from mlops_ray.errors import RequestError

_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_SHOWN_CHARACTERS = 60
_NAME_CHARACTERS = 80


def refusal(text: str, field: str, row: int | None = None, *, status: int = 422) -> RequestError:
    """Return the error whose message is the field's name and ``text``."""
    field = field[:_NAME_CHARACTERS]
    return RequestError(f"{field} {text}", status=status, field=field, row=row)


def refuse_unknown(
    name: str, known: Iterable[str], what: str = "field", row: int | None = None
) -> NoReturn:
    """Raise for a name that nobody knows; the nearest known one is offered."""
    names = sorted(known)
    close = difflib.get_close_matches(name[:_NAME_CHARACTERS], names, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"
    text = f"unknown {what} {shorten(name)}{hint}"
    raise RequestError(text, field=name[:_NAME_CHARACTERS], row=row)


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    return _KINDS.get(type(value), type(value).__name__)


def shorten(text: str) -> str:
    """Return the text in quotes, cut where it is long."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "…")
