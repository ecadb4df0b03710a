"""The gate: may a challenger replace the champion? A pure decision with its evidence."""

from __future__ import annotations

import math

from mlops_ray.config.training import Gate
from mlops_ray.metadata.types import GateDecision, Report

Evidence = dict[str, float | str | None]


def decide(challenger: Report, champion: Report | None, gate: Gate) -> GateDecision:
    """Decide whether the challenger passes; both reports must be of the same held-out rows.

    It passes when its calibration error is at most ``max_calibration_error``, and it gains at least
    ``min_gain`` on the champion in ``metric``. An equal model gains nothing and passes only where
    ``min_gain`` is negative. Without a champion, the metric must reach ``floor``, where there is
    one. A report with a metric that is no number never passes.
    """
    evidence = _evidence(challenger, champion, gate)
    reason = _objection(challenger, champion, gate)
    return GateDecision(
        passed=reason is None,
        reason=reason or _praise(challenger, champion, gate),
        evidence=evidence,
    )


def gain(challenger: Report, champion: Report, gate: Gate) -> float:
    """Return how much better the challenger is: AUC up, log loss down."""
    if gate.metric == "auc":
        return challenger.auc - champion.auc
    return champion.log_loss - challenger.log_loss


def _objection(challenger: Report, champion: Report | None, gate: Gate) -> str | None:
    if not all(map(math.isfinite, (challenger.auc, challenger.log_loss))):
        return "the challenger has a metric that is no number"
    limit = gate.max_calibration_error
    if limit is not None and not challenger.calibration_error <= limit:
        return f"calibration error {challenger.calibration_error:.4f} is above {limit:g}"
    if champion is None:
        return _below_floor(_metric(challenger, gate), gate)
    if _rows(challenger) != _rows(champion):
        return "the challenger and the champion were judged on different rows"
    if champion.has_seen:
        return "the champion was trained on rows that judge it here: train with a later until"
    gained = gain(challenger, champion, gate)
    if not math.isfinite(gained):
        return "the champion has a metric that is no number"
    if gained < gate.min_gain or (gained <= 0 and gate.min_gain >= 0):
        return f"{gate.metric} gain {gained:+.4f} is too small (least {gate.min_gain:+g})"
    return None


def _below_floor(value: float, gate: Gate) -> str | None:
    if gate.floor is None:
        return None
    if gate.metric == "auc" and value < gate.floor:
        return f"no champion, and auc {value:.4f} is below the floor {gate.floor:g}"
    if gate.metric == "log_loss" and value > gate.floor:
        return f"no champion, and log_loss {value:.4f} is above the floor {gate.floor:g}"
    return None


def _praise(challenger: Report, champion: Report | None, gate: Gate) -> str:
    if champion is None:
        return f"no champion; {gate.metric} {_metric(challenger, gate):.4f}"
    return f"{gate.metric} gain {gain(challenger, champion, gate):+.4f} on {challenger.rows} rows"


def _metric(report: Report, gate: Gate) -> float:
    return report.auc if gate.metric == "auc" else report.log_loss


def _rows(report: Report) -> tuple[object, ...]:
    return report.rows, report.positives, report.since, report.until


def _evidence(challenger: Report, champion: Report | None, gate: Gate) -> Evidence:
    evidence: Evidence = {
        "metric": gate.metric,
        "min_gain": gate.min_gain,
        "floor": gate.floor,
        "max_calibration_error": gate.max_calibration_error,
        "gain": None if champion is None else gain(challenger, champion, gate),
    }
    for role, report in (("challenger", challenger), ("champion", champion)):
        for name in ("rows", "positives", "auc", "log_loss", "calibration_error"):
            value = None if report is None else getattr(report, name)
            evidence[f"{role}_{name}"] = None if value is None else float(value)
    evidence["champion_version"] = None if champion is None else champion.version
    for bound in ("since", "until"):
        moment = getattr(challenger, bound)
        evidence[bound] = None if moment is None else moment.isoformat()
    return evidence
