"""One field of a request, checked value by value: slow, and exact about what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from numpy.typing import NDArray

from mlops_ray.config.features import RequestField
from mlops_ray.serving.formats.instants import instant
from mlops_ray.serving.formats.refusal import kind_of, refusal

Column = NDArray[Any]

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
_LARGEST_INT = 2**1023


class FieldCheck:
    """Says what is wrong with the JSON values of one field."""

    def __init__(self, name: str, field: RequestField) -> None:
        self._name = name
        self._nullable = field.nullable
        self._minimum = -math.inf if field.minimum is None else field.minimum
        self._maximum = math.inf if field.maximum is None else field.maximum
        self._one: Callable[[Any, int], None] = getattr(self, f"_{field.dtype}")

    def check(self, values: Sequence[Any]) -> None:
        """Raise a RequestError 422 that names the first row whose value is not as declared."""
        for row, value in enumerate(values):
            if value is not None:
                self._one(value, row)
            elif not self._nullable:
                raise refusal("must not be null", self._name, row)

    def check_bounds(self, value: float, row: int) -> None:
        """Raise a RequestError 422 where a number is outside of the declared range."""
        if value < self._minimum:
            raise refusal(f"must be at least {_spelled(self._minimum)}", self._name, row)
        if value > self._maximum:
            raise refusal(f"must be at most {_spelled(self._maximum)}", self._name, row)

    def _string(self, value: Any, row: int) -> None:
        if type(value) is not str:
            self._wrong("a string", value, row)

    def _bool(self, value: Any, row: int) -> None:
        if type(value) is not bool:
            self._wrong("true or false", value, row)

    def _int(self, value: Any, row: int) -> None:
        if type(value) is not int:
            self._wrong("a whole number", value, row)
        if not INT64_MIN <= value <= INT64_MAX:
            raise refusal("does not fit 64 bits", self._name, row)
        self.check_bounds(value, row)

    def _float(self, value: Any, row: int) -> None:
        kind = type(value)
        if kind is not float and kind is not int:
            self._wrong("a number", value, row)
        if kind is float and not math.isfinite(value):
            raise refusal("must be finite: NaN and Infinity are refused", self._name, row)
        if kind is int and abs(value) > _LARGEST_INT:
            raise refusal("is too large", self._name, row)
        self.check_bounds(value, row)

    def _timestamp(self, value: Any, row: int) -> None:
        instant(value, self._name, row)

    def _wrong(self, wanted: str, value: Any, row: int) -> NoReturn:
        raise refusal(f"must be {wanted}, not {kind_of(value)}", self._name, row)


def whole_bounds(field: RequestField) -> tuple[int | None, int | None]:
    """Return the least and the greatest whole number in a field's range, None where it has no end."""
    low, high = field.minimum, field.maximum
    return (
        None if low is None or math.isinf(low) else math.ceil(low),
        None if high is None or math.isinf(high) else math.floor(high),
    )


def _spelled(bound: float) -> str:
    """Return a bound with all its digits, and without a fraction that is 0."""
    return str(bound).removesuffix(".0")
