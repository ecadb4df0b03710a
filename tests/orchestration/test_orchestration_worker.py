"""What a step function is called with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlops_ray.errors import WorkflowError
from mlops_ray.metadata.artifacts import open_artifacts
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.worker import bind


def numbers(first: int, **others: int) -> dict[str, int]:
    return {"first": first, **others}


def plain(first: int) -> int:
    return first


def injected(context: Context, **others: Any) -> Any:
    return context, others


@pytest.fixture
def context(home: Home) -> Context:
    return Context("p", home, "r", "s")


def bound(function: Any, context: Context, home: Home, **given: Any) -> Any:
    return function(**bind(function, given, context, open_artifacts(home)))


def test_further_inputs_reach_a_function_that_takes_any(context: Context, home: Home) -> None:
    found = bound(numbers, context, home, first="1", a="2", others=3)
    assert found == {"first": 1, "a": 2, "others": 3}
    assert bound(injected, context, home, path="x") == (context, {"path": "x"})
    with pytest.raises(WorkflowError, match="input 'a' does not fit"):
        bound(numbers, context, home, first=1, a=Path("x"))


def test_an_input_that_is_not_taken_is_not_dropped(context: Context, home: Home) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'second'"):
        bound(plain, context, home, first=1, second=2)
