"""When a call is tried again: pauses that grow and are drawn at random, and a budget.

A pause is drawn evenly from zero to a bound that doubles with each try ("full jitter", M. Brooker,
"Exponential Backoff and Jitter", AWS Architecture Blog, 2015), so that clients which failed together
do not come back together. The budget keeps a service that fails from being asked many times over.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from mlops_ray.errors import ServingError


@dataclass(frozen=True, slots=True)
class Retries:
    """How often, and after what pauses, a call is tried again.

    A call has ``attempts`` tries at most. The pause before the second lasts at most
    ``first_pause_s``, and the bound doubles up to ``longest_pause_s``; where the endpoint says when
    to come again, the pause comes on top of that. Over time a client repeats at most the share
    ``share`` of its calls, and ``reserve`` more.
    """

    attempts: int = 4
    first_pause_s: float = 0.05
    longest_pause_s: float = 2.0
    share: float = 0.1
    reserve: int = 10

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_pause_s < 0 or self.longest_pause_s < 0:
            raise ServingError("retries need at least one attempt, and pauses of zero or more")
        check_budget(self.share, self.reserve)

    def pause_s(self, failures: int, retry_after_s: float | None, draw: random.Random) -> float:
        """Return how long to wait after so many failures (1 or more)."""
        # Beyond 2**64 no bound is still growing, and a float would overflow.
        bound_s = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(failures - 1, 64))
        return (retry_after_s or 0.0) + draw.uniform(0.0, bound_s)


class Budget:
    """Lets at most ``reserve`` + ``share`` × calls extra requests through; for any threads."""

    def __init__(self, share: float, reserve: int) -> None:
        self._share = share
        self._most = max(1.0, float(reserve))
        self._balance = float(reserve)
        self._lock = threading.Lock()

    def earn(self) -> None:
        """Count a call."""
        with self._lock:
            self._balance = min(self._most, self._balance + self._share)

    def spend(self) -> bool:
        """Take an extra request out of the budget; False where it has none left."""
        with self._lock:
            # A share such as 0.1 has no exact sum: ten of them are to be worth one.
            if self._balance < 1.0 - 1e-9:
                return False
            self._balance -= 1.0
            return True


class Retrying:
    """Decides for one client, and any threads, whether a call that failed is tried again."""

    def __init__(self, retries: Retries | None) -> None:
        self._retries = retries
        self._budget = Budget(retries.share, retries.reserve) if retries is not None else None
        self._draw = random.Random()

    def begin(self) -> None:
        """Count a call."""
        if self._budget is not None:
            self._budget.earn()

    def pause_s(self, failures: int, retry_after: str | None, left_s: float) -> float | None:
        """Return how long to wait before the next try, None where there is to be none."""
        retries, budget = self._retries, self._budget
        if retries is None or budget is None or failures >= retries.attempts:
            return None
        pause_s = retries.pause_s(failures, retry_after_s(retry_after), self._draw)
        return pause_s if pause_s < left_s and budget.spend() else None


def check_budget(share: float, reserve: int) -> None:
    """Raise a ServingError where there is no such budget."""
    if not 0 <= share <= 1 or reserve < 0:
        raise ServingError("a budget needs a share in [0, 1] and a reserve of 0 or more")


def retry_after_s(value: str | None) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks to wait; None where it says nothing."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
