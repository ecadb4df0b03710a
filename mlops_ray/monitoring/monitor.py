"""The monitor's memory, and what it measures from it. No Ray in here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.config.monitoring import Monitoring
from mlops_ray.errors import MonitoringError
from mlops_ray.metadata.delta import Delta
from mlops_ray.metadata.profile import Counts, Reference
from mlops_ray.metadata.stability import psi_by_feature, psi_noise
from mlops_ray.monitoring.labels import LabelJoin
from mlops_ray.monitoring.measurement import (
    DriftMeasurement,
    Measurement,
    PerformanceMeasurement,
    ServedVersion,
)
from mlops_ray.monitoring.windows import ProfileWindows, is_day
from mlops_ray.training.evaluation import auc, log_loss

_LEAST_KEPT = timedelta(days=2)


class Monitor:
    """Takes deltas from the replicas of one endpoint and measures windows of them.

    A delta that does not go beyond what was taken in already changes nothing. ``positions`` says up
    to where that is in the log of each replica.
    """

    def __init__(self, monitoring: Monitoring) -> None:
        self._monitoring = monitoring
        self._windows = ProfileWindows()
        keep = max(monitoring.performance.window, _LEAST_KEPT)
        self._labels = LabelJoin(monitoring.label_horizon, keep)
        self.positions: dict[str, int] = {}
        self.rows_observed = 0

    def observe(self, delta: Delta) -> bool:
        """Take a delta in; return whether it was new."""
        if all(at <= self.positions.get(name, 0) for name, at in delta.positions.items()):
            return False
        if len(delta.predictions):
            self._labels.add_predictions(delta.predictions)
        if len(delta.labels):
            self._labels.add_labels(delta.labels)
        for digest, buckets in delta.buckets.items():
            # One odd day must not stand in the way of all that comes with it.
            self._windows.add(digest, {d: counts for d, counts in buckets.items() if is_day(d)})
        self.rows_observed += len(delta.predictions)
        # Last: of what could not be taken in, nothing may be passed over.
        kept = {n: at for n, at in self.positions.items() if n not in delta.gone}
        self.positions = {**kept, **delta.positions}
        return True

    def measure(
        self, now: datetime, served: ServedVersion, reference: Mapping[str, Counts]
    ) -> Measurement:
        """Measure drift and labelled error of ``served`` over the windows that end ``now``.

        Args:
            now: The present moment of the monitor's clock.
            served: The version that answers.
            reference: Counts per feature of the rows that this version was trained on.
        """
        self.forget(now)
        return Measurement(
            at=now,
            version=served.version,
            drift=self._measure_drift(now, served, reference),
            performance=self._measure_performance(now, served),
        )

    def forget(self, now: datetime) -> None:
        """Drop what no window after ``now`` can need."""
        self._windows.forget(now, self._monitoring.drift.window)
        self._labels.forget(now)

    def rows(self, since: datetime, until: datetime) -> pa.Table:
        """Return the predictions with time in [since, until), joined with labels known so far."""
        return self._labels.rows(since, until)

    def save(self, folder: Path) -> None:
        """Write everything into the existing, empty ``folder``."""
        rows, unmatched = self._labels.tables()
        _write_table(rows, folder / "predictions.arrow")
        _write_table(unmatched, folder / "labels.arrow")
        document = {
            "windows": self._windows.to_json(),
            "positions": self.positions,
            "rows_observed": self.rows_observed,
        }
        (folder / "monitor.json").write_text(json.dumps(document, separators=(",", ":")))

    def load(self, folder: Path) -> None:
        """Take over what ``save`` wrote.

        Raises:
            MonitoringError: The folder cannot be read.
        """
        try:
            document = json.loads((folder / "monitor.json").read_text())
            self._windows = ProfileWindows.from_json(document["windows"])
            self.positions = dict(document["positions"])
            self.rows_observed = document["rows_observed"]
            tables = [_read_table(folder / f"{name}.arrow") for name in ("predictions", "labels")]
            self._labels.restore(*tables)
        except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
            raise MonitoringError(
                "the monitor's saved state cannot be read",
                where=str(folder),
                why=f"{type(error).__name__}: {error}",
                fix="move the folder away: the monitor then starts with an empty memory",
            ) from error

    def _measure_drift(
        self, now: datetime, served: ServedVersion, reference: Mapping[str, Counts]
    ) -> DriftMeasurement:
        window = self._monitoring.drift.window
        live = self._windows.window(served.reference_digest, now, window)
        if not live.rows:
            return DriftMeasurement()
        trained = int(max((counts.sum() for counts in reference.values()), default=0))
        noise = psi_noise(self._monitoring.drift.bins, trained, live.rows) if trained else None
        return DriftMeasurement(
            rows=live.rows, psi=psi_by_feature(reference, live.counts), noise=noise
        )

    def _measure_performance(self, now: datetime, served: ServedVersion) -> PerformanceMeasurement:
        since = now - self._monitoring.performance.window
        rows = self._labels.rows(since, now, served.version)
        rows = rows.filter(pc.is_valid(rows["label"]))
        measured = PerformanceMeasurement(
            rows=len(rows), reference_auc=served.auc, reference_log_loss=served.log_loss
        )
        if not len(rows):
            return measured
        labels, scores = rows["label"].to_numpy(), rows["score"].to_numpy()
        positives = int(np.sum(labels))
        both = 0 < positives < len(labels)
        return measured.model_copy(
            update={
                "positives": positives,
                "auc": auc(labels, scores) if both else None,
                "log_loss": log_loss(labels, scores),
            }
        )


def reference_counts(path: Path) -> tuple[str, dict[str, Counts]]:
    """Read a package's ``reference.json``; return its digest and the counts per feature.

    Raises:
        MonitoringError: The file cannot be read.
    """
    try:
        reference = Reference.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MonitoringError(
            "the training reference of the version in service cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            fix="deploy a version whose package is complete, or train it again",
        ) from error
    return reference.digest, dict(reference.profile.counts)


def _write_table(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read_table(path: Path) -> pa.Table:
    # Read, not memory-mapped: the file's folder is removed when the next state is saved.
    with pa.OSFile(str(path), "rb") as source:
        return pa.ipc.open_file(source).read_all()
