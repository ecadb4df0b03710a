"""What the monitor knows at one moment: drift and labelled error of the version in service."""

from __future__ import annotations

from pydantic import Field

from mlops_ray.config.base import Frozen, Instant


class ServedVersion(Frozen):
    """The version that answers, and what was measured when it was judged (None where unknown)."""

    version: int
    reference_digest: str = ""
    package: str = ""
    auc: float | None = None
    log_loss: float | None = None


class DriftMeasurement(Frozen):
    """PSI of each feature over the drift window.

    ``noise`` is the PSI that sampling alone would give a feature of that many ``bins``.
    """

    rows: int = 0
    psi: dict[str, float] = Field(default_factory=dict)
    noise: float | None = None


class PerformanceMeasurement(Frozen):
    """Labelled error over the performance window, beside the version's own evaluation.

    ``auc`` is None where the window lacks positives or negatives; all are None without rows.
    """

    rows: int = 0
    positives: int = 0
    auc: float | None = None
    log_loss: float | None = None
    reference_auc: float | None = None
    reference_log_loss: float | None = None


class Measurement(Frozen):
    """Everything that a decision is made from."""

    at: Instant
    version: int
    drift: DriftMeasurement = DriftMeasurement()
    performance: PerformanceMeasurement = PerformanceMeasurement()
