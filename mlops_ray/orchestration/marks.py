"""Marks that a step function carries: what it does to the world beside returning a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
MARK = "__mlops_ray_mode__"


def effect(function: _Function) -> _Function:
    """Say of a step function that it changes something outside: a step of mode *pure* that uses it
    is refused, since a cached step would not do it again."""
    setattr(function, MARK, "effect")
    return function


def ensure(function: _Function) -> _Function:
    """Say of a step function that it makes a state so and must run in every attempt: a step of mode
    *pure* that uses it is refused."""
    setattr(function, MARK, "ensure")
    return function
