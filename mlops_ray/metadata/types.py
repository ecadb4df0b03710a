"""The small records that rooms hand to each other."""

from __future__ import annotations

from pydantic import Field

from mlops_ray.config.base import Frozen, Instant


class FeatureVersions(Frozen):
    """Which version of each view's offline table was current, and up to when views are complete.

    ``tables`` holds the ids of the Delta tables: the versions count only there.
    """

    versions: dict[str, int]
    tables: dict[str, str] = Field(default_factory=dict)
    until: Instant | None = None
    rows_written: int = 0


class SliceMetrics(Frozen):
    """Metrics of the rows where ``column`` has ``value``."""

    column: str
    value: str
    rows: int
    auc: float | None
    log_loss: float


class Report(Frozen):
    """How good a model is on held-out rows.

    ``calibration`` holds, for each bin of predicted probability, (mean score, share of positives,
    rows); ``calibration_error`` is the expected calibration error over them. ``version`` is set for
    a registered model; ``has_seen`` where it was trained on some of the rows that judge it here.
    """

    rows: int
    positives: int
    auc: float
    log_loss: float
    calibration_error: float
    calibration: tuple[tuple[float, float, int], ...] = ()
    slices: tuple[SliceMetrics, ...] = ()
    since: Instant | None = None
    until: Instant | None = None
    version: int | None = None
    has_seen: bool = False


class GateDecision(Frozen):
    """Whether a challenger may replace the champion, why, and from which numbers."""

    passed: bool
    reason: str
    evidence: dict[str, float | str | None]


class ModelVersion(Frozen):
    """One version in the registry. ``package`` is the folder with its files."""

    name: str
    version: int
    package: str
    digest: str


class Endpoint(Frozen):
    """A deployed endpoint: ``url`` is the base of its HTTP routes; versions by alias."""

    name: str
    url: str
    versions: dict[str, int]
