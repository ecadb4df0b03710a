"""What went wrong, whose budget pays for another try, and how long to wait before it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from mlops_ray.config.workflow import Backoff, Retries
from mlops_ray.errors import ArtifactError, LedgerError, StorageError

Cause = Literal["user", "infrastructure", "preemption"]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NODE_DIED = "node has died"


def classify(error: BaseException) -> Cause:
    """Say whose fault an error is: the step's own, that of what it ran on, or a lost node's."""
    from ray import exceptions as ray_errors

    if isinstance(error, ray_errors.NodeDiedError):
        return "preemption"
    if isinstance(error, ray_errors.RayActorError):
        lost = error.preempted or _NODE_DIED in str(error)
        return "preemption" if lost else "infrastructure"
    if isinstance(error, ray_errors.RayTaskError):
        return "user"
    if isinstance(error, ArtifactError):
        return "user" if error.digest is None and type(error) is ArtifactError else "infrastructure"
    from_outside = (ray_errors.RayError, LedgerError, MemoryError)
    return "infrastructure" if isinstance(error, from_outside) else "user"


def headline(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    raised = getattr(error, "cause", None)  # of an error of Ray's, what was raised in the worker
    error = raised if isinstance(raised, BaseException) else error
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    # Ray's traceback of a worker has what was raised at its end.
    line = lines[-1 if type(error).__name__ == "RayTaskError" else 0] if lines else "no details"
    return f"{type(error).__name__}: {line}"


def digest_of(error: BaseException) -> str | None:
    """Return the digest of the artifact that is missing or corrupt, if the error is about one."""
    if isinstance(error, ArtifactError) and not isinstance(error, StorageError):
        return error.digest
    return None


class Budget:
    """The tries that one call has left, by cause."""

    __slots__ = ("_retries", "_spent")

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self._spent: dict[Cause, int] = {}

    def spend(self, cause: Cause) -> int | None:
        """Take one try; return how many of this cause that makes, None where none was left."""
        spent = self._spent.get(cause, 0)
        if spent >= getattr(self._retries, cause):
            return None
        self._spent[cause] = spent + 1
        return spent + 1


class Budgets:
    """The budgets of all calls of a run, by step and item.

    Args:
        retries: Says what a step declares.
    """

    def __init__(self, retries: Callable[[str], Retries]) -> None:
        self._retries = retries
        self._budgets: dict[tuple[str, int], Budget] = {}

    def spend(self, name: str, item: int, cause: Cause) -> int | None:
        """Take one try of a call, see ``Budget.spend``."""
        if (name, item) not in self._budgets:
            self._budgets[name, item] = Budget(self._retries(name))
        return self._budgets[name, item].spend(cause)


def delay_s(backoff: Backoff, tries: int, chance: float) -> float:
    """Return how many seconds to wait before try ``tries`` (from 1).

    Args:
        backoff: The declared growth.
        tries: How many tries of this cause there were, with this one.
        chance: A random number in [0, 1): what of the jitter is taken off.
    """
    first_s, most_s = backoff.first.total_seconds(), backoff.most.total_seconds()
    try:
        full_s = min(first_s * backoff.factor ** (tries - 1), most_s)
    except OverflowError:
        full_s = most_s if first_s else 0.0
    return full_s * (1 - backoff.jitter * chance)
