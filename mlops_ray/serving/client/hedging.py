"""When a second request is sent beside one that takes long (J. Dean and L. A. Barroso, "The Tail at
Scale", Communications of the ACM 56(2), 2013): the first answer counts, the other is cancelled.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from mlops_ray.errors import ServingError
from mlops_ray.serving.client.retries import Budget, check_budget

_WINDOW = 512
_ENOUGH = 20
_EVERY = 32


@dataclass(frozen=True, slots=True)
class Hedging:
    """A prediction that has no answer ``after_s`` seconds later is sent once more.

    Without ``after_s``, that is the ``quantile`` of how long recent calls took, as soon as 20 are
    known. At most the share ``share`` of the calls, and ``reserve`` more, are sent twice.
    """

    after_s: float | None = None
    quantile: float = 0.95
    share: float = 0.05
    reserve: int = 5

    def __post_init__(self) -> None:
        if self.after_s is not None and self.after_s < 0:
            raise ServingError("after_s must not be negative")
        if not 0 < self.quantile < 1:
            raise ServingError("quantile must lie between 0 and 1")
        check_budget(self.share, self.reserve)


class Hedger:
    """Decides for one client, and any threads."""

    def __init__(self, hedging: Hedging) -> None:
        self._hedging = hedging
        self._latencies_s: deque[float] = deque(maxlen=_WINDOW)
        self._known = 0
        self._after_s = hedging.after_s
        self._budget = Budget(hedging.share, hedging.reserve)
        self._lock = threading.Lock()

    def begin(self) -> float | None:
        """Count a call; return after how many seconds to send it again, None for never."""
        self._budget.earn()
        return self._after_s

    def allow(self) -> bool:
        """Say whether there is budget to send one more; it is spent then."""
        return self._budget.spend()

    def learn(self, latency_s: float) -> None:
        """Take in how long an answer took."""
        if self._hedging.after_s is not None:
            return
        with self._lock:
            self._latencies_s.append(latency_s)
            self._known += 1
            if self._known == _ENOUGH or (self._known > _ENOUGH and self._known % _EVERY == 0):
                ordered = sorted(self._latencies_s)
                self._after_s = ordered[int(self._hedging.quantile * (len(ordered) - 1))]
