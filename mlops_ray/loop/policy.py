"""When to retrain: a pure function of what is known."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from mlops_ray.config.base import Frozen, Instant, format_duration
from mlops_ray.config.monitoring import Drift, Loop, Monitoring, Performance
from mlops_ray.monitoring.measurement import (
    DriftMeasurement,
    Measurement,
    PerformanceMeasurement,
)

Evidence = dict[str, float | int | str | None]

_NAMED_FEATURES = 4


class LoopState(Frozen):
    """What the policy sees: the newest measurement, and what the loop has done so far.

    ``last_retraining_at`` is when the last retraining was triggered, whatever came of it.
    """

    now: Instant
    measurement: Measurement
    retraining: bool = False
    last_retraining_at: Instant | None = None
    retrainings: int = 0


class Decision(Frozen):
    """What to do, why in one sentence, and the numbers that it rests on."""

    action: Literal["wait", "retrain"]
    reason: str
    evidence: Evidence = Field(default_factory=dict)


def decide(state: LoopState, loop: Loop, monitoring: Monitoring) -> Decision:
    """Return whether to retrain now.

    Retrains when features have drifted or the labelled error has grown (see ``Drift`` and
    ``Performance``), unless a retraining is under way, the last one was less than ``loop.cooldown``
    ago, or ``loop.max_retrainings`` have been made. The evidence is complete whichever way it goes.
    """
    drift, performance = state.measurement.drift, state.measurement.performance
    drifted = drifted_features(drift, monitoring.drift)
    evidence = _evidence(state, drifted)
    triggers = [
        *drift_breaches(drift, monitoring.drift),
        *performance_breaches(performance, monitoring.performance),
    ]
    if not triggers:
        return Decision(action="wait", reason=_calm(state, monitoring), evidence=evidence)
    found = "; ".join(triggers)
    hindrance = _hindrance(state, loop)
    if hindrance:
        return Decision(action="wait", reason=f"{hindrance} ({found})", evidence=evidence)
    return Decision(action="retrain", reason=found, evidence=evidence)


def drifted_features(measured: DriftMeasurement, drift: Drift) -> dict[str, float]:
    """Return the features with a PSI of ``drift.threshold`` or more, the worst first.

    Patterns in ``drift.exclude`` (``weather__*``) name features that do not count.
    """
    over = {name: value for name, value in measured.psi.items() if value >= drift.threshold}
    counted = [
        name for name in over if not any(fnmatchcase(name, pattern) for pattern in drift.exclude)
    ]
    return {name: over[name] for name in sorted(counted, key=lambda name: (-over[name], name))}


def drift_breaches(measured: DriftMeasurement, drift: Drift) -> Iterator[str]:
    """Yield in one sentence that features have drifted, if they have."""
    drifted = drifted_features(measured, drift)
    if measured.rows < drift.min_rows or len(drifted) < drift.min_features:
        return
    worst = [f"{name} {value:.2f}" for name, value in drifted.items()][:_NAMED_FEATURES]
    rest = len(drifted) - len(worst)
    more = f" and {rest} more" if rest else ""
    yield f"drift: PSI ≥ {drift.threshold:g} in {len(drifted)} features ({', '.join(worst)}{more})"


def performance_breaches(
    measured: PerformanceMeasurement, performance: Performance
) -> Iterator[str]:
    """Yield a sentence for each measure of the labelled error that has grown too much."""
    if measured.rows < performance.min_rows:
        return
    if _excess(measured.reference_auc, measured.auc, performance.max_auc_drop):
        yield f"AUC {measured.auc:.3f}, was {measured.reference_auc:.3f} at evaluation"
    if _excess(measured.log_loss, measured.reference_log_loss, performance.max_log_loss_rise):
        was = measured.reference_log_loss
        yield f"log loss {measured.log_loss:.3f}, was {was:.3f} at evaluation"


def _excess(high: float | None, low: float | None, limit: float) -> bool:
    return high is not None and low is not None and high - low >= limit


def _hindrance(state: LoopState, loop: Loop) -> str:
    if state.retraining:
        return "a retraining is under way"
    if loop.max_retrainings is not None and state.retrainings >= loop.max_retrainings:
        return f"all {loop.max_retrainings} retrainings have been made"
    last = state.last_retraining_at
    if last is not None and state.now - last < loop.cooldown:
        return f"less than {format_duration(loop.cooldown)} since the last retraining"
    return ""


def _calm(state: LoopState, monitoring: Monitoring) -> str:
    drift, performance = state.measurement.drift, state.measurement.performance
    few_drift = drift.rows < monitoring.drift.min_rows
    few_labels = performance.rows < monitoring.performance.min_rows
    if few_drift and few_labels:
        return f"too few rows to judge: {drift.rows} for drift, {performance.rows} labelled"
    return "within bounds"


def _evidence(state: LoopState, drifted: dict[str, float]) -> Evidence:
    drift, performance = state.measurement.drift, state.measurement.performance
    last = state.last_retraining_at
    return {
        "version": state.measurement.version,
        "drift_rows": drift.rows,
        "drifted_features": len(drifted),
        "worst_features": ", ".join(f"{name} {value:.3f}" for name, value in drifted.items()),
        "psi_max": max(drift.psi.values(), default=None),
        "psi_noise": drift.noise,
        "labelled_rows": performance.rows,
        "auc": performance.auc,
        "reference_auc": performance.reference_auc,
        "log_loss": performance.log_loss,
        "reference_log_loss": performance.reference_log_loss,
        "retrainings": state.retrainings,
        "last_retraining_at": last.isoformat() if last else None,
    }
