"""What an endpoint counts of itself: requests, errors, latency by stage, batches, the online store.

The request path adds to plain numbers. About once a second what has grown goes to Ray's metrics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10
)  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

PUBLISH_EVERY_S = 1.0

_RECENT = 4096

_SCALED_BY = ("predict", "infer", "grpc_infer")
_ENDED = (200, 504)
"""Answered, or not in time: without the latter, a service that answers nothing would look idle."""

Tags = dict[str, str]


class Series(Protocol):
    """Where the numbers go."""

    def add(self, name: str, tags: Tags, amount: float) -> None:
        """Raise a counter by ``amount``, which is above 0."""

    def set(self, name: str, tags: Tags, value: float) -> None:
        """Set a gauge."""


class RaySeries:
    """Ray's metrics, which Ray exports to Prometheus as ``ray_<name>`` (counters with ``_total``)."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def add(self, name: str, tags: Tags, amount: float) -> None:
        """Raise a counter."""
        from ray.util.metrics import Counter

        self._metric(Counter, name, tags).inc(amount, tags)

    def set(self, name: str, tags: Tags, value: float) -> None:
        """Set a gauge."""
        from ray.util.metrics import Gauge

        self._metric(Gauge, name, tags).set(value, tags)

    def _metric(self, kind: Callable[..., Any], name: str, tags: Tags) -> Any:
        if name not in self._made:
            self._made[name] = kind(name, HELP[name], tuple(tags))
        return self._made[name]


HELP = {
    "mlops_ray_requests": "Requests by route of the API, status, alias and version that answered",
    "mlops_ray_errors": "Requests that were refused or failed, by kind",
    "mlops_ray_rows": "Rows scored, by alias and version",
    "mlops_ray_request_seconds_bucket": "Requests whose answer took at most le seconds",
    "mlops_ray_request_seconds_sum": "Seconds that all answers took together",
    "mlops_ray_request_seconds_count": "Answers",
    "mlops_ray_stage_seconds_bucket": "Times that a stage took at most le seconds",
    "mlops_ray_stage_seconds_sum": "Seconds that a stage took in all",
    "mlops_ray_stage_seconds_count": "Times that a stage was gone through",
    "mlops_ray_batch_rows_bucket": "Batches of at most le rows",
    "mlops_ray_batch_rows_sum": "Rows of all batches",
    "mlops_ray_batch_rows_count": "Batches",
    "mlops_ray_batch_requests": "Requests of all batches",
    "mlops_ray_in_flight": "Requests that are being answered now",
    "mlops_ray_queued": "Requests that wait for a batch now",
    "mlops_ray_features_read": "Rows looked up in the online store, by view",
    "mlops_ray_features_missing": "Rows that the online store did not have, by view",
    "mlops_ray_features_expired": "Rows that were older than the view's TTL, by view",
    "mlops_ray_features_degraded": "Rows answered without the online store, by what was used instead",
    "mlops_ray_features_age_seconds": "Age of a row of the view when it was last read",
    "mlops_ray_log_pending_rows": "Rows of the prediction log that are not on disk yet",
}

_KINDS = {
    400: "malformed", 401: "no_token", 403: "no_scope", 404: "unknown", 405: "method", 409: "conflict",
    413: "too_large", 415: "media_type", 422: "invalid", 429: "rate", 500: "internal",
    503: "unavailable", 504: "timeout",
}  # fmt: skip


class Histogram:
    """Counts by upper bound, and a sum."""

    __slots__ = ("_bounds", "_counts", "_sent", "_sent_sum", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._sent = [0] * (len(bounds) + 1)
        self._sent_sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def publish(self, series: Series, name: str, tags: Tags) -> None:
        """Send what came since the last time, as Prometheus wants it: counts up to each bound."""
        fresh = [now - sent for now, sent in zip(self._counts, self._sent, strict=True)]
        total = self._sum
        if not any(fresh):
            return
        below = 0
        for bound, count in zip((*self._bounds, "+Inf"), fresh, strict=True):
            below += count
            if below:
                series.add(f"{name}_bucket", {**tags, "le": str(bound)}, below)
        series.add(f"{name}_count", tags, below)
        if total > self._sent_sum:
            series.add(f"{name}_sum", tags, total - self._sent_sum)
        self._sent = [sent + count for sent, count in zip(self._sent, fresh, strict=True)]
        self._sent_sum = total


class Recorder:
    """Counts what an endpoint does. Belongs to the event loop's thread.

    Args:
        endpoint: The endpoint's name, a tag of every metric.
        series: Where the numbers go; None keeps them here.
    """

    def __init__(self, endpoint: str, series: Series | None) -> None:
        self._endpoint = endpoint
        self._series = series
        self._requests: dict[tuple[str, int, str, int, str], int] = {}
        self._latencies: dict[tuple[str, str, int, str], Histogram] = {}
        self._stages: dict[tuple[str, str, int, str], Histogram] = {}
        self._rows: dict[tuple[str, int, str], int] = {}
        self._batches = Histogram(ROWS)
        self._merged = 0
        self._degraded: dict[str, int] = {}
        self._sent: dict[tuple[str, tuple[str, ...]], float] = {}
        self._recent_s: deque[float] = deque(maxlen=_RECENT)

    def request(
        self,
        action: str,
        status: int,
        route: str = "",
        version: int = 0,
        seconds: float = 0.0,
        model: str | None = None,
    ) -> None:
        """Count a request: its route of the API, its HTTP status, who answered and how long it took.

        ``model`` is a registered name, None the endpoint's own.
        """
        model = self._endpoint if model is None else model
        key = (action, status, route, version, model)
        self._requests[key] = self._requests.get(key, 0) + 1
        where = (action, route, version, model)
        found = self._latencies.get(where)
        if found is None:
            found = self._latencies[where] = Histogram(SECONDS)
        found.add(seconds)
        if status in _ENDED and action in _SCALED_BY:
            self._recent_s.append(seconds)

    def latency_p95_s(self) -> float:
        """Return the 95th percentile of how long predictions took since the last call, 0 without any."""
        recent = sorted(self._recent_s)
        self._recent_s.clear()
        return recent[int(0.95 * (len(recent) - 1))] if recent else 0.0

    def stage(
        self,
        stage: str,
        seconds: float,
        route: str = "",
        version: int = 0,
        model: str | None = None,
    ) -> None:
        """Count the time of a stage; where it is one model's, the rest says whose."""
        if route and model is None:
            model = self._endpoint
        key = (stage, route, version, model or "")
        found = self._stages.get(key)
        if found is None:
            found = self._stages[key] = Histogram(SECONDS)
        found.add(seconds)

    def scored(self, route: str, version: int, rows: int, model: str | None = None) -> None:
        """Count rows that a model answered; ``model`` as for ``request``."""
        key = (route, version, self._endpoint if model is None else model)
        self._rows[key] = self._rows.get(key, 0) + rows

    def batch(self, requests: int, rows: int) -> None:
        """Count a batch."""
        self._batches.add(rows)
        self._merged += requests

    def degraded(self, how: str, rows: int) -> None:
        """Count rows that were answered without the online store."""
        self._degraded[how] = self._degraded.get(how, 0) + rows

    def publish(self, gauges: Mapping[str, float], reads: Mapping[str, Any]) -> None:
        """Send what has grown since the last time.

        Args:
            gauges: Value by name, of the endpoint as a whole.
            reads: By view what its reader counted: ``features.online.reader.Reads``.
        """
        series = self._series
        if series is None:
            return
        base = {"endpoint": self._endpoint}
        for (action, status, route, version, model), count in self._requests.items():
            tags = {**base, "action": action, "status": str(status)}
            tags |= _whose(route, version, model)
            self._grow("mlops_ray_requests", tags, count)
            if status >= 400:
                kind = {**base, "action": action, "kind": _KINDS.get(status, str(status))}
                self._grow("mlops_ray_errors", kind, count)
        for (action, route, version, model), latency in self._latencies.items():
            tags = {**base, "action": action, **_whose(route, version, model)}
            latency.publish(series, "mlops_ray_request_seconds", tags)
        for (stage, route, version, model), latency in self._stages.items():
            tags = {**base, "stage": stage, **_whose(route, version, model)}
            latency.publish(series, "mlops_ray_stage_seconds", tags)
        for (route, version, model), rows in self._rows.items():
            self._grow("mlops_ray_rows", base | _whose(route, version, model), rows)
        self._batches.publish(series, "mlops_ray_batch_rows", base)
        self._grow("mlops_ray_batch_requests", base, self._merged)
        for how, rows in self._degraded.items():
            self._grow("mlops_ray_features_degraded", {**base, "how": how}, rows)
        for name, value in gauges.items():
            series.set(name, base, value)
        self._publish_reads(series, reads)

    def _publish_reads(self, series: Series, reads: Mapping[str, Any]) -> None:
        for view, counted in reads.items():
            tags = {"endpoint": self._endpoint, "view": view}
            self._grow("mlops_ray_features_read", tags, counted.rows)
            self._grow("mlops_ray_features_missing", tags, counted.missing)
            self._grow("mlops_ray_features_expired", tags, counted.expired)
            if counted.age_s is not None:
                series.set("mlops_ray_features_age_seconds", tags, counted.age_s)

    def _grow(self, name: str, tags: Tags, count: float) -> None:
        key = (name, tuple(tags.values()))
        grown = count - self._sent.get(key, 0)
        if grown > 0 and self._series is not None:
            self._series.add(name, tags, grown)
            self._sent[key] = count


def _whose(route: str, version: int, model: str) -> Tags:
    return {"model": model, "route": route, "version": str(version) if version else ""}
