"""Conditions of steps: ``[not] $reference [operator literal]``."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlops_ray.errors import WorkflowError
from mlops_ray.orchestration import references
from mlops_ray.orchestration.references import Reference

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_TOKEN = re.compile(r"\s*(\$[\w/.]+|[=!<>]=|[<>]|'[^']*'|\"[^\"]*\"|[-+.\w]+|\S)")


class ConditionError(ValueError):
    """A condition cannot be read; says at which character, counted from 1."""

    def __init__(self, text: str, position: int, what: str) -> None:
        super().__init__(f"{what} at character {position + 1} of {text!r}")


@dataclass(frozen=True)
class Constant:
    """A value that is known before anything runs: what a nested workflow was given."""

    value: Any

    def __str__(self) -> str:
        return _show(self.value)


@dataclass(frozen=True)
class Condition:
    """When a step runs: the operand is true, or compares so with the literal.

    ``operator`` None asks whether the operand is true in Python's sense.
    """

    operand: Reference | Constant
    negated: bool = False
    operator: str | None = None
    literal: Any = None

    def __str__(self) -> str:
        text = str(self.operand)
        if self.operator is not None:
            text += f" {self.operator} {_show(self.literal)}"
        return f"not {text}" if self.negated else text

    def refusal(self, value: Any) -> str | None:
        """Say in words why the condition does not hold of the operand's value; None: it holds.

        Raises:
            WorkflowError: The value cannot be compared with the literal.
        """
        if bool(self._compare(value)) != self.negated:
            return None
        if isinstance(self.operand, Constant):
            return f"{self} does not hold"
        return f"{self} is false: it is {_show(value)}"

    def constant_refusal(self) -> str | None:
        """Say why a condition on a constant never holds; None where it does or is not known."""
        return self.refusal(self.operand.value) if isinstance(self.operand, Constant) else None

    def on(self, operand: Reference | Constant) -> Condition:
        """Return the same condition on another operand."""
        return replace(self, operand=operand)

    def _compare(self, value: Any) -> Any:
        if self.operator is None:
            return value
        try:
            return _OPERATORS[self.operator](value, self.literal)
        except TypeError as error:
            raise WorkflowError(
                f"{self} cannot be answered: {_show(value)} and {_show(self.literal)} do not compare"
            ) from error


def parse(text: str) -> Condition:
    """Read a condition.

    Raises:
        ConditionError: It is not of the form ``[not] $reference [operator literal]``.
    """
    tokens = [(match[1], match.start(1)) for match in _TOKEN.finditer(text)]
    tokens.append(("", len(text)))
    negated = tokens[0][0] == "not"
    word, position = tokens[1 if negated else 0]
    reference = references.parse(word)
    if reference is None:
        raise ConditionError(
            text, position, f"expected a reference such as $gate.passed{_at(word)}"
        )
    rest = tokens[2 if negated else 1 :]
    if rest[0][0] == "":
        return Condition(reference, negated)
    sign, position = rest[0]
    if sign not in _OPERATORS:
        raise ConditionError(text, position, f"expected one of {' '.join(_OPERATORS)}{_at(sign)}")
    literal = _literal(text, *rest[1])
    if rest[2:] and rest[2][0]:
        raise ConditionError(text, rest[2][1], f"expected the end{_at(rest[2][0])}")
    return Condition(reference, negated, sign, literal)


def _literal(text: str, word: str, position: int) -> Any:
    if word in _WORDS:
        return _WORDS[word]
    if word[:1] in ("'", '"') and len(word) > 1:
        return word[1:-1]
    if _NUMBER.fullmatch(word):
        return int(word) if word.lstrip("+-").isdigit() else float(word)
    raise ConditionError(
        text, position, f"expected a number, true, false, null or text in quotes{_at(word)}"
    )


def _at(word: str) -> str:
    return f", found {word!r}" if word else ", found the end"


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
