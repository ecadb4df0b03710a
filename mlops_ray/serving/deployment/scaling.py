"""Autoscaling by how long answers take.

Serve's controller gets this module by value and may not have the package: only the standard library.
"""

from __future__ import annotations

import math
from typing import Any

LATENCY_METRIC = "latency_p95_ms"
"""What replicas report: the 95th percentile since their last report, 0 where nothing was asked."""

_FASTEST_GROWTH = 2.0
_IDLE_SHARE = 0.5


class ByLatency:
    """Keeps the 95th percentile of the latency near ``target_ms``.

    Above the target, replicas grow in proportion, at most to twice as many in one decision. Below half
    of it one goes. In between nothing changes. Serve applies its bounds and delays to what is
    returned, and brings the first replica back by itself.
    """

    def __init__(self, target_ms: float) -> None:
        self._target_ms = target_ms

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there should be, and no state."""
        replicas = int(context.target_num_replicas)
        reported = (context.aggregated_metrics or {}).get(LATENCY_METRIC, {})
        latency_ms = max(reported.values(), default=0.0)
        if latency_ms > self._target_ms:
            growth = min(_FASTEST_GROWTH, latency_ms / self._target_ms)
            return math.ceil(replicas * growth), {}
        if latency_ms < _IDLE_SHARE * self._target_ms:
            return max(0, replicas - 1), {}
        return replicas, {}
