"""A request that has been let in, and what is done with each kind of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mlops_ray.serving.endpoint.asgi import Reply
from mlops_ray.serving.endpoint.guard import ANYONE, Principal
from mlops_ray.serving.endpoint.tokens import Scope


@dataclass(slots=True, eq=False)
class Call:
    """One request: its headers and whole body, and what its path says.

    ``model`` is the name in the path where that is not the endpoint's own. A handler notes in
    ``route`` and ``answered`` which alias and version answered, for the metrics.
    """

    headers: dict[bytes, bytes]
    body: bytes = b""
    deadline_s: float = 0.0
    model: str | None = None
    version: int | None = None
    route: str = ""
    answered: int = 0
    principal: Principal = ANYONE


Handler = Callable[[Call], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Action:
    """What a method of a path does. Without ``scope`` it needs no token, and no turn: health."""

    name: str
    handler: Handler
    scope: Scope | None = None


Methods = dict[str, Action]
"""The actions of a path by HTTP method."""
