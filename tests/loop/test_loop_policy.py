from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.config.monitoring import Loop, Monitoring
from mlops_ray.loop.policy import LoopState, decide, drifted_features
from mlops_ray.monitoring.measurement import (
    DriftMeasurement,
    Measurement,
    PerformanceMeasurement,
)

NOW = datetime(2013, 5, 3, tzinfo=UTC)
MONITORING = Monitoring.model_validate(
    {
        "every": "1d",
        "drift": {"window": "7d", "threshold": 0.2, "min_features": 2, "min_rows": 100},
        "performance": {"window": "7d", "min_rows": 50},
    }
)
LOOP = Loop.model_validate({"cooldown": "14d", "max_retrainings": 5})

probability = st.floats(0.01, 0.99)
measured_psi = st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 3), max_size=6)


@st.composite
def states(draw: st.DrawFn) -> LoopState:
    since = draw(st.none() | st.integers(0, 40))
    return LoopState(
        now=NOW,
        retraining=draw(st.booleans()),
        retrainings=draw(st.integers(0, 7)),
        last_retraining_at=None if since is None else NOW - timedelta(days=since),
        measurement=Measurement(
            at=NOW,
            version=1,
            drift=DriftMeasurement(rows=draw(st.integers(0, 300)), psi=draw(measured_psi)),
            performance=PerformanceMeasurement(
                rows=draw(st.integers(0, 100)),
                auc=draw(st.none() | probability),
                log_loss=draw(st.none() | probability),
                reference_auc=draw(st.none() | probability),
                reference_log_loss=draw(st.none() | probability),
            ),
        ),
    )


def state(psi: dict[str, float] | None = None, **more: Any) -> LoopState:
    performance = PerformanceMeasurement(
        rows=200, auc=0.70, log_loss=0.5, reference_auc=0.71, reference_log_loss=0.5
    )
    performance = performance.model_copy(update=more.pop("performance", {}))
    drift = DriftMeasurement(rows=more.pop("rows", 1000), psi=psi or {})
    measurement = Measurement(at=NOW, version=1, drift=drift, performance=performance)
    return LoopState(now=NOW, measurement=measurement, **more)


@given(states())
def test_never_retrains_when_something_is_in_the_way(found: LoopState) -> None:
    decision = decide(found, LOOP, MONITORING)
    last = found.last_retraining_at
    in_cooldown = last is not None and NOW - last < LOOP.cooldown
    if found.retraining or in_cooldown or found.retrainings >= 5:
        assert decision.action == "wait"


@given(states())
def test_retrains_exactly_when_a_trigger_stands_free(found: LoopState) -> None:
    """The rule, written out a second time."""
    drift, error = found.measurement.drift, found.measurement.performance
    drifted = drift.rows >= 100 and sum(value >= 0.2 for value in drift.psi.values()) >= 2
    fell = rose = False
    if error.rows >= 50:
        if error.auc is not None and error.reference_auc is not None:
            fell = error.reference_auc - error.auc >= 0.03
        if error.log_loss is not None and error.reference_log_loss is not None:
            rose = error.log_loss - error.reference_log_loss >= 0.05
    last = found.last_retraining_at
    free = (
        not found.retraining
        and found.retrainings < 5
        and (last is None or NOW - last >= timedelta(days=14))
    )
    expected = "retrain" if free and (drifted or fell or rose) else "wait"
    assert decide(found, LOOP, MONITORING).action == expected


@given(states(), st.sampled_from("abcdef"), st.floats(0, 3))
def test_more_drift_never_calls_a_retraining_off(found: LoopState, name: str, by: float) -> None:
    drift = found.measurement.drift
    worse = drift.model_copy(update={"psi": drift.psi | {name: drift.psi.get(name, 0.0) + by}})
    measurement = found.measurement.model_copy(update={"drift": worse})
    after = found.model_copy(update={"measurement": measurement})
    actions = [decide(state, LOOP, MONITORING).action for state in (found, after)]
    assert actions != ["retrain", "wait"]


@given(states())
def test_is_deterministic_and_always_shows_its_numbers(found: LoopState) -> None:
    decision = decide(found, LOOP, MONITORING)
    assert decision == decide(found, LOOP, MONITORING)
    assert decision.reason
    assert decision.evidence["drift_rows"] == found.measurement.drift.rows
    assert decision.evidence["labelled_rows"] == found.measurement.performance.rows


def test_drift_names_the_worst_features() -> None:
    decision = decide(state({"a": 0.2, "b": 0.9, "c": 0.19}), LOOP, MONITORING)
    assert decision.action == "retrain"
    assert decision.reason == "drift: PSI ≥ 0.2 in 2 features (b 0.90, a 0.20)"
    assert decision.evidence["worst_features"] == "b 0.900, a 0.200"


def test_too_few_drifted_features_or_rows() -> None:
    assert decide(state({"a": 0.5}), LOOP, MONITORING).reason == "within bounds"
    assert decide(state({"a": 0.5, "b": 0.5}, rows=99), LOOP, MONITORING).action == "wait"
    few = state(rows=3, performance={"rows": 4})
    assert decide(few, LOOP, MONITORING).reason == (
        "too few rows to judge: 3 for drift, 4 labelled"
    )


def test_excluded_features_do_not_count() -> None:
    drift = MONITORING.drift.model_copy(update={"exclude": ("weather__*",)})
    measured = DriftMeasurement(rows=500, psi={"weather__temp": 2.0, "hour": 0.3})
    assert drifted_features(measured, drift) == {"hour": 0.3}


def test_degraded_performance() -> None:
    fallen = decide(state(performance={"auc": 0.67}), LOOP, MONITORING)
    assert fallen.action == "retrain"
    assert fallen.reason == "AUC 0.670, was 0.710 at evaluation"
    assert decide(state(performance={"log_loss": 0.56}), LOOP, MONITORING).action == "retrain"
    assert decide(state(performance={"auc": None}), LOOP, MONITORING).action == "wait"


def test_a_hindered_trigger_says_both() -> None:
    hindered = state({"a": 1.0, "b": 1.0}, last_retraining_at=NOW - timedelta(days=13))
    decision = decide(hindered, LOOP, MONITORING)
    assert decision.action == "wait"
    assert decision.reason.startswith("less than 14d since the last retraining (drift: ")
    at_the_end = hindered.model_copy(update={"last_retraining_at": NOW - timedelta(days=14)})
    assert decide(at_the_end, LOOP, MONITORING).action == "retrain"
