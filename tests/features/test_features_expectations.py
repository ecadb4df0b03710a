from __future__ import annotations

import pickle

import pyarrow as pa
import pytest

from mlops_ray.config.features import Expectation
from mlops_ray.errors import ExpectationError, SchemaError, SourceError
from mlops_ray.features.expectations import check, evaluate

TABLE = pa.table(
    {
        "id": ["a", "b", "b", None],
        "number": [1, 2, 3, None],
        "share": [0.1, float("nan"), 0.9, None],
        "sound": [0.1, 0.5, 0.9, None],
        "flag": [True, False, None, None],
        "at": pa.array([0, 1, 2, None], pa.timestamp("s")),
        "word": pa.array(["x", "y", "x", None]).dictionary_encode(),
    }
)


@pytest.mark.parametrize(
    ("expectation", "passed"),
    [
        ({"column": "number", "nulls": 0.25}, True),
        ({"column": "number", "nulls": 0.24}, False),
        ({"column": "number", "minimum": 1, "maximum": 3}, True),
        ({"column": "number", "minimum": 1.5}, False),
        ({"column": "number", "maximum": 2.9}, False),
        ({"column": "share", "nulls": 0.25}, True),
        ({"column": "share", "minimum": 0.1}, False),
        ({"column": "share", "maximum": 0.9}, False),
        ({"column": "sound", "minimum": 0.1, "maximum": 0.9}, True),
        ({"column": "word", "allowed": ["x", "y", "z"]}, True),
        ({"column": "word", "allowed": ["x"]}, False),
        ({"column": "number", "unique": True}, True),
        ({"column": "id", "unique": True}, False),
        ({"column": "id", "dtype": "string"}, True),
        ({"column": "word", "dtype": "string"}, True),
        ({"column": "number", "dtype": "int"}, True),
        ({"column": "number", "dtype": "float"}, True),
        ({"column": "share", "dtype": "float"}, True),
        ({"column": "flag", "dtype": "bool"}, True),
        ({"column": "at", "dtype": "timestamp"}, True),
    ],
)
def test_each_check(expectation: dict, passed: bool) -> None:
    declared = [Expectation.model_validate(expectation)]
    results = evaluate(TABLE, declared)
    assert all(result.passed for result in results) == passed
    assert results
    if passed:
        assert check(TABLE, declared) == results
    else:
        with pytest.raises(ExpectationError, match=expectation["column"]):
            check(TABLE, declared)


def test_all_failures_are_listed_and_warnings_are_not_among_them() -> None:
    declared = [
        Expectation(column="number", maximum=1),
        Expectation(column="id", unique=True),
        Expectation(column="share", nulls=0, severity="warn"),
    ]
    with pytest.raises(ExpectationError) as caught:
        check(TABLE, declared, "features.sources.s")
    text = str(caught.value)
    assert "2 expectations do not hold" in text
    assert "number: maximum should be at most 1, is 3" in text
    assert "id: repeated values" in text
    assert "share" not in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_a_warning_is_recorded() -> None:
    results = check(TABLE, [Expectation(column="share", nulls=0, severity="warn")])
    assert [(r.passed, r.severity, r.observed) for r in results] == [(False, "warn", "0.25")]


@pytest.mark.parametrize(
    ("expectation", "message"),
    [
        (Expectation(column="nmber"), r"no column 'nmber'[\s\S]*did you mean 'number'"),
        (
            Expectation(column="id", dtype="int"),
            "'id' has the wrong type: expected int, found string",
        ),
        (Expectation(column="share", dtype="int"), "expected int, found double"),
        (Expectation(column="id", minimum=1), "expected a number, found string"),
        (Expectation(column="number", allowed=("1",)), "expected string, found int64"),
    ],
)
def test_a_wrong_type_is_named(expectation: Expectation, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check(TABLE, [expectation], "features.sources.s")
    warned = check(TABLE, [expectation.model_copy(update={"severity": "warn"})])
    assert [result.passed for result in warned] == [False]


def test_an_empty_table_holds_what_speaks_of_values() -> None:
    empty = TABLE.slice(0, 0)
    declared = [
        Expectation(column="number", minimum=0, maximum=1, nulls=0, unique=True),
        Expectation(column="word", allowed=("x",)),
    ]
    assert all(result.passed for result in check(empty, declared))


@pytest.mark.usefixtures("shop_project")
def test_a_function_may_judge_the_whole_table() -> None:
    declared = Expectation(check="shop_project.no_more_than_three", severity="fail")
    assert check(TABLE.slice(0, 3), [declared])[0].passed
    with pytest.raises(ExpectationError, match=r"no_more_than_three: there are 4 rows"):
        check(TABLE, [declared])
    warned = declared.model_copy(update={"severity": "warn"})
    (result,) = check(TABLE, [warned])
    assert (result.column, result.passed, result.observed) == ("", False, "there are 4 rows")
    with pytest.raises(SourceError, match="fails failed"):
        check(TABLE, [Expectation(check="shop_project.fails")])
    with pytest.raises(SourceError, match=r"returned \[1, 2\]"):
        check(TABLE, [Expectation(check="shop_project.judges_oddly")])
