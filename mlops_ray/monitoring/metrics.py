"""The monitor's numbers as Prometheus metrics, exported by Ray as ``ray_mlops_ray_…``."""

from __future__ import annotations

from typing import Any

from mlops_ray.monitoring.measurement import Measurement

PHASES = ("watching", "triggered", "retraining")


class MonitorMetrics:
    """Gauges of one project. Made once in the process that measures."""

    def __init__(self, project: str) -> None:
        self._project = {"project": project}
        self._psi = self._gauge("psi", "Population stability index by feature.", "feature")
        self._rows = self._gauge("window_rows", "Rows in the window.", "window")
        self._auc = self._gauge("labelled_auc", "AUC of the labelled window.")
        self._log_loss = self._gauge("labelled_log_loss", "Log loss of the labelled window, nats.")
        self._version = self._gauge("served_version", "Version that answers.")
        self._retrainings = self._gauge("retrainings", "Retrainings by outcome.", "outcome")
        self._phase = self._gauge("loop_phase", "1 for the loop's phase, else 0.", "phase")

    def measured(self, measurement: Measurement) -> None:
        """Show a measurement. What could not be measured keeps its last value."""
        drift, performance = measurement.drift, measurement.performance
        for feature, value in drift.psi.items():
            self._psi.set(value, self._project | {"feature": feature})
        self._rows.set(drift.rows, self._project | {"window": "drift"})
        self._rows.set(performance.rows, self._project | {"window": "performance"})
        self._version.set(measurement.version, self._project)
        if performance.auc is not None:
            self._auc.set(performance.auc, self._project)
        if performance.log_loss is not None:
            self._log_loss.set(performance.log_loss, self._project)

    def counted(self, phase: str, *, retrainings: int, promotions: int, failures: int) -> None:
        """Show the loop's phase and how its retrainings ended so far."""
        for name in PHASES:
            self._phase.set(float(name == phase), self._project | {"phase": name})
        totals = {"triggered": retrainings, "promoted": promotions, "failed": failures}
        for outcome, total in totals.items():
            self._retrainings.set(total, self._project | {"outcome": outcome})

    def _gauge(self, name: str, description: str, *tags: str) -> Any:
        from ray.util.metrics import Gauge

        return Gauge(f"mlops_ray_{name}", description, tag_keys=("project", *tags))
