"""Conditions: how they are read, and what they say."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.errors import WorkflowError
from mlops_ray.orchestration.conditions import Condition, ConditionError, parse
from mlops_ray.orchestration.reachability import contradiction
from mlops_ray.orchestration.references import Reference

OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@pytest.mark.parametrize(
    ("text", "value", "reason"),
    [
        ("$gate.passed", True, None),
        ("$gate.passed", False, "$gate.passed is false: it is false"),
        ("not $quiet", True, "not $quiet is false: it is true"),
        ("$report.auc >= 0.7", 0.64, "$report.auc >= 0.7 is false: it is 0.64"),
        ("$report.auc>=-1e-3", 0, None),
        ("$a.b == 'full'", "half", '$a.b == "full" is false: it is "half"'),
        ('not $a.b != "x y"', "x y", None),
        ("$a == null", None, None),
        ("$a != true", False, None),
    ],
)
def test_conditions_say_why_they_do_not_hold(text: str, value: Any, reason: str | None) -> None:
    assert parse(text).refusal(value) == reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a reference such as $gate.passed, found the end at character 1"),
        ("gate.passed", "expected a reference such as $gate.passed, found 'gate.passed'"),
        ("$a = 1", "expected one of == != <= >= < >, found '=' at character 4"),
        ("$a > ", "found the end at character 6"),
        ("$a > many", "text in quotes, found 'many' at character 6"),
        ("$a > 1 and $b", "expected the end, found 'and' at character 8"),
        ("not not $a", "found 'not' at character 5"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_position(text: str, expected: str) -> None:
    with pytest.raises(ConditionError) as caught:
        parse(text)
    assert expected in str(caught.value)


def test_values_that_do_not_compare_are_an_error() -> None:
    with pytest.raises(WorkflowError, match=r"null and 0\.7 do not compare"):
        parse("$a > 0.7").refusal(None)


LITERALS = st.one_of(
    st.integers(-5, 5),
    st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 1)),
    st.sampled_from([True, False, None, "a", "b c"]),
)
CONDITIONS = st.builds(
    Condition,
    st.just(Reference("a", ("b",))),
    st.booleans(),
    st.sampled_from(list(OPERATORS)),
    LITERALS,
)


@given(CONDITIONS, LITERALS)
def test_writing_and_reading_gives_the_same_condition_with_python_s_meaning(
    condition: Condition, value: Any
) -> None:
    assert parse(str(condition)) == condition
    assert condition.operator is not None
    try:
        expected = OPERATORS[condition.operator](value, condition.literal) != condition.negated
    except TypeError:
        return
    assert (condition.refusal(value) is None) == expected


@given(st.lists(CONDITIONS, min_size=1, max_size=4))
def test_a_contradiction_is_found_exactly_when_no_value_fulfils_all(
    conditions: list[Condition],
) -> None:
    """The oracle tries a fine grid, and a good many other values."""
    values: list[Any] = [n / 20 for n in range(-120, 121)]
    values += [True, False, None, "", "a", "aa", "b c", "b d", "z"]

    def holds(condition: Condition, value: Any) -> bool:
        try:
            return condition.refusal(value) is None
        except WorkflowError:
            return False

    possible = any(all(holds(c, value) for c in conditions) for value in values)
    assert (contradiction(conditions) is None) == possible
