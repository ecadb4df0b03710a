"""Expectations: what a source's rows must hold after cleaning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.config.features import Expectation
from mlops_ray.config.targets import load
from mlops_ray.errors import ExpectationError, MlopsRayError, SchemaError, SourceError
from mlops_ray.features.columns import column, wrong_type

_TYPES = {
    "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "int": pa.types.is_integer,
    "float": lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    "bool": pa.types.is_boolean,
    "timestamp": lambda kind: pa.types.is_timestamp(kind) or pa.types.is_date(kind),
}
_SHOWN = 3


@dataclass(frozen=True)
class ExpectationResult:
    """One check: what was expected of ``column``, or of the whole table by a function, what was seen."""

    column: str
    check: str
    expected: str
    observed: str
    passed: bool
    severity: str

    def __str__(self) -> str:
        if not self.column:
            return f"{self.check}: {self.observed}"
        return f"{self.column}: {self.check} should be {self.expected}, is {self.observed}"


def check(
    table: pa.Table, expectations: Sequence[Expectation], where: str = "source"
) -> list[ExpectationResult]:
    """Return a result for every declared check; all hold, but for those of severity warn.

    Raises:
        SchemaError: A column is missing or has another type than declared.
        ExpectationError: Checks of severity fail do not hold; lists all of them.
    """
    results = evaluate(table, expectations, where)
    enforce(results, where)
    return results


def evaluate(
    table: pa.Table, expectations: Sequence[Expectation], where: str = "source"
) -> list[ExpectationResult]:
    """Return a result for every declared check, whether it holds or not.

    A missing column or a wrong type of severity warn is a result like others; of severity fail, an
    error at once, since the checks after it mean nothing. NaN is no null, and breaks both bounds.
    """
    results: list[ExpectationResult] = []
    for expectation in expectations:
        if expectation.check is not None:
            results.append(_custom(table, expectation, expectation.check, where))
            continue
        try:
            values = _typed_column(table, expectation, where)
        except SchemaError as error:
            if expectation.severity == "fail":
                raise
            expected = expectation.dtype or "present"
            results.append(_result(expectation, "type", expected, error.what, False))
            continue
        results.extend(_checks(values, expectation))
    return results


def enforce(results: Sequence[ExpectationResult], where: str = "source") -> None:
    """Raise an ExpectationError that lists every failed result of severity fail, if there is one."""
    failed = [result for result in results if not result.passed and result.severity == "fail"]
    if failed:
        raise ExpectationError(
            f"{len(failed)} expectation{'s do' if len(failed) > 1 else ' does'} not hold",
            where=where,
            why="\n       ".join(str(result) for result in failed),
            fix="repair the data in the clean function, or relax the expectation "
            "(severity: warn records it and goes on)",
        )


def _custom(
    table: pa.Table, expectation: Expectation, target: str, where: str
) -> ExpectationResult:
    try:
        answer = load(target)(table)
    except MlopsRayError:
        raise
    except Exception as error:
        raise SourceError(
            f"{target} failed",
            where=f"{where}.expectations",
            why=f"{type(error).__name__}: {error}",
            fix="call the function in a Python shell to see the whole error",
        ) from error
    if answer is not True and not isinstance(answer, str):
        raise SourceError(
            f"{target} returned {answer!r}",
            where=f"{where}.expectations",
            fix="return True where the table is right, or a sentence that says what is wrong",
        )
    observed = "so" if answer is True else answer
    return ExpectationResult("", target, "right", observed, answer is True, expectation.severity)


def _typed_column(table: pa.Table, expectation: Expectation, where: str) -> pa.ChunkedArray:
    name = expectation.column
    assert name is not None
    values = column(table, name, where)
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    if expectation.dtype is not None and not _TYPES[expectation.dtype](kind):
        raise wrong_type(name, expectation.dtype, kind, where)
    bounded = expectation.minimum is not None or expectation.maximum is not None
    if bounded and not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise wrong_type(name, "a number", kind, where)
    if expectation.allowed is not None and not _TYPES["string"](kind):
        raise wrong_type(name, "string", kind, where)
    return values


def _checks(values: pa.ChunkedArray, expectation: Expectation) -> Iterator[ExpectationResult]:
    if expectation.dtype is not None:
        yield _result(expectation, "type", expectation.dtype, str(values.type), True)
    if expectation.nulls is not None:
        share = values.null_count / len(values) if len(values) else 0.0
        passed = share <= expectation.nulls
        yield _result(
            expectation, "share of nulls", f"at most {expectation.nulls:g}", f"{share:.4g}", passed
        )
    if expectation.minimum is not None or expectation.maximum is not None:
        yield from _bounds(values, expectation)
    if expectation.allowed is not None:
        yield _allowed(values.drop_null(), expectation)
    if expectation.unique:
        present = values.drop_null()
        repeated = len(present) - len(pc.unique(present))
        yield _result(expectation, "repeated values", "none", f"{repeated} repeated", repeated == 0)


def _bounds(values: pa.ChunkedArray, expectation: Expectation) -> Iterator[ExpectationResult]:
    extremes = pc.min_max(values)
    low, high = extremes["min"].as_py(), extremes["max"].as_py()
    if pa.types.is_floating(values.type) and pc.any(pc.is_nan(values)).as_py():
        # NaN lies within no bounds, and min_max passes over it.
        low = high = math.nan
    if expectation.minimum is not None:
        passed = low is None or low >= expectation.minimum
        yield _result(
            expectation, "minimum", f"at least {expectation.minimum:g}", _number(low), passed
        )
    if expectation.maximum is not None:
        passed = high is None or high <= expectation.maximum
        yield _result(
            expectation, "maximum", f"at most {expectation.maximum:g}", _number(high), passed
        )


def _allowed(present: pa.ChunkedArray, expectation: Expectation) -> ExpectationResult:
    allowed = expectation.allowed or ()
    others = pc.unique(present.filter(_not_in(present, allowed))).to_pylist()
    shown = ", ".join(repr(value) for value in others[:_SHOWN])
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    observed = f"also {shown}{more}" if others else "only these"
    return _result(expectation, "values", f"one of {', '.join(allowed)}", observed, not others)


def _not_in(values: pa.ChunkedArray, allowed: Sequence[str]) -> Any:
    return pc.invert(pc.is_in(values, value_set=pa.array(list(allowed), values.type)))


def _result(
    expectation: Expectation, check: str, expected: str, observed: str, passed: bool
) -> ExpectationResult:
    severity = expectation.severity
    return ExpectationResult(expectation.column or "", check, expected, observed, passed, severity)


def _number(value: float | None) -> str:
    return "no value" if value is None else f"{value:g}"
