"""The controller's world: the endpoint on Ray Serve, the registry, the ledger, Ray's metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlops_ray.errors import MonitoringError
from mlops_ray.loop.controller import ControllerSpec
from mlops_ray.loop.state import ControllerState
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.delta import Delta
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.package import REFERENCE
from mlops_ray.metadata.prediction_log.news import keep_from, read_news
from mlops_ray.metadata.profile import Counts
from mlops_ray.metadata.types import Report
from mlops_ray.monitoring.measurement import Measurement, ServedVersion
from mlops_ray.monitoring.metrics import MonitorMetrics
from mlops_ray.monitoring.monitor import reference_counts
from mlops_ray.serving.deployment.deploy import describe, flush

_READER = "monitor"
_TELL_EVERY_S = 600.0


class ServeWorld:
    """Reaches the endpoint, registry and ledger of one project."""

    def __init__(self, spec: ControllerSpec) -> None:
        self._spec = spec
        self._home = Home(Path(spec.home))
        self._ledger = open_ledger(self._home)
        self._metrics = MonitorMetrics(spec.project)
        self._references: dict[str, tuple[str, dict[str, Counts]]] = {}
        self._reports: dict[int, Report | None] = {}
        self._told: dict[str, int] | None = None
        self._told_s = 0.0

    def flush(self) -> None:
        """Make every replica write its log; return when it can be read."""
        flush(self._spec.endpoint)

    def news(self, positions: Mapping[str, int]) -> Delta | None:
        """Return what was answered beyond ``positions``; the log keeps what comes after them."""
        folder = self._home.predictions(self._spec.project)
        found = read_news(folder, positions)
        # Afterwards: a reader that cannot read must not keep the log from ever getting smaller.
        if positions != self._told or time.monotonic() - self._told_s > _TELL_EVERY_S:
            keep_from(folder, _READER, positions)
            self._told, self._told_s = dict(positions), time.monotonic()
        return found

    def served(self) -> ServedVersion:
        """Ask the endpoint which version answers.

        Raises:
            ServingError: The endpoint cannot be reached.
            MonitoringError: It has no model, or the model's package is not complete.
        """
        described = describe(self._spec.endpoint)
        alias = described["answer"]
        if alias is None:
            raise MonitoringError(
                "the endpoint has no model yet",
                where=self._spec.endpoint.url,
                fix="deploy one: `mlops-ray run workflow=deploy`",
            )
        version, package = described["versions"][alias], described["packages"][alias]
        report = self._report(version)
        return ServedVersion(
            version=version,
            reference_digest=self._reference(package)[0],
            package=package,
            auc=report.auc if report else None,
            log_loss=report.log_loss if report else None,
        )

    def reference(self, served: ServedVersion) -> Mapping[str, Counts]:
        """Return the counts per feature of the rows that the version was trained on."""
        return self._reference(served.package)[1]

    def record(self, kind: str, data: Mapping[str, Any]) -> None:
        """Append an event to the ledger, under the run whose session it is."""
        run_id = data.get("session") or None
        self._ledger.append(self._spec.project, kind, dict(data), run_id=run_id, step="monitor")

    def publish(self, state: ControllerState, measurement: Measurement | None) -> None:
        """Show the state as metrics."""
        if measurement is not None:
            self._metrics.measured(measurement)
        self._metrics.counted(
            state.phase,
            retrainings=state.retrainings,
            promotions=state.promotions,
            failures=state.failures,
        )

    def _reference(self, package: str) -> tuple[str, dict[str, Counts]]:
        if package not in self._references:
            self._references = {package: reference_counts(Path(package) / REFERENCE)}
        return self._references[package]

    def _report(self, version: int) -> Report | None:
        if version not in self._reports:
            self._reports[version] = _evaluation(self._home, f"{self._spec.project}@{version}")
        return self._reports[version]


def _evaluation(home: Home, ref: str) -> Report | None:
    """Return how the version was judged, or None where the registry does not know it.

    In a process that ends afterwards: MLflow takes seconds and some hundred MB to import, and the
    monitor needs it once per version.
    """
    import ray

    task = ray.remote(num_cpus=0, max_calls=1)(_read_evaluation)
    return ray.get(task.remote(home, ref))


def _read_evaluation(home: Home, ref: str) -> Report | None:
    from mlops_ray.registry.registry import Registry

    registry = Registry(home)
    if registry.find(ref) is None:
        return None
    return Report.model_validate(registry.describe(ref)["report"])
