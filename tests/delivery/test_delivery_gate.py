from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_ray.config.training import Gate
from mlops_ray.delivery import steps
from mlops_ray.delivery.gate import decide, gain
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import GateDecision, ModelVersion, Report
from mlops_ray.orchestration.context import Context, Silent

SHARES = st.floats(0, 1)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    return Report(
        rows=100,
        positives=50,
        auc=draw(SHARES),
        log_loss=draw(st.floats(0, 5)),
        calibration_error=draw(SHARES),
    )


GATES = st.builds(
    Gate,
    metric=st.sampled_from(["auc", "log_loss"]),
    min_gain=st.floats(-0.2, 0.2),
    floor=st.one_of(st.none(), SHARES),
    max_calibration_error=st.one_of(st.none(), st.floats(0.01, 1)),
)


def better(report: Report, by: float) -> Report:
    changes = {"auc": report.auc + by, "log_loss": report.log_loss - by}
    return report.model_copy(update=changes)


@given(reports(), reports(), GATES)
def test_who_passes_really_gained_what_the_gate_asks(challenger, champion, gate):
    decision = decide(challenger, champion, gate)
    gained = gain(challenger, champion, gate)
    calibrated = (
        gate.max_calibration_error is None
        or challenger.calibration_error <= gate.max_calibration_error
    )
    strictly = gained > 0 or gate.min_gain < 0
    assert decision.passed == (calibrated and gained >= gate.min_gain and strictly)
    assert decision.reason


@given(reports(), GATES)
def test_an_equal_model_never_replaces_unless_the_gate_says_so(report, gate):
    decision = decide(report, report, gate)
    if gate.min_gain >= 0:
        assert not decision.passed


@given(reports(), reports(), GATES, st.floats(0, 1))
def test_a_better_challenger_never_fares_worse(challenger, champion, gate, by):
    if decide(challenger, champion, gate).passed:
        assert decide(better(challenger, by), champion, gate).passed
    if decide(challenger, None, gate).passed:
        assert decide(better(challenger, by), None, gate).passed


@given(reports(), reports(), GATES)
def test_two_models_cannot_both_beat_each_other(one, other, gate):
    if gate.min_gain >= 0:
        assert not (decide(one, other, gate).passed and decide(other, one, gate).passed)


@given(reports(), GATES)
def test_without_a_champion_the_floor_decides(report, gate):
    decision = decide(report, None, gate.model_copy(update={"max_calibration_error": None}))
    if gate.floor is None:
        assert decision.passed
    elif gate.metric == "auc":
        assert decision.passed == (report.auc >= gate.floor)
    else:
        assert decision.passed == (report.log_loss <= gate.floor)


@given(reports(), st.one_of(st.none(), reports()), GATES)
def test_the_evidence_holds_every_number(challenger, champion, gate):
    evidence = decide(challenger, champion, gate).evidence
    assert evidence["challenger_auc"] == challenger.auc
    assert evidence["champion_log_loss"] == (champion and champion.log_loss)
    assert evidence["min_gain"] == gate.min_gain
    assert evidence["metric"] == gate.metric


def test_reports_on_different_rows_are_not_compared():
    one = Report(rows=10, positives=5, auc=0.9, log_loss=0.1, calibration_error=0)
    other = one.model_copy(update={"rows": 11, "auc": 0.1})
    decision = decide(one, other, Gate())
    assert not decision.passed
    assert "different rows" in decision.reason


@pytest.mark.parametrize("field", ["auc", "log_loss"])
def test_a_metric_that_is_no_number_never_passes(field):
    good = Report(rows=10, positives=5, auc=0.9, log_loss=0.1, calibration_error=0)
    broken = good.model_copy(update={field: math.nan})
    assert not decide(broken, good, Gate(min_gain=-1)).passed
    assert not decide(broken, None, Gate()).passed


class Events(Silent):
    def __init__(self) -> None:
        self.found: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **data: Any) -> None:
        self.found.append((kind, data))


def test_promote_moves_champion_and_sets_first_once(home: Home, tmp_path):
    from registry.test_registry_registry import LINEAGE, REPORT, make_package

    from mlops_ray.registry.registry import Registry

    registry = Registry(home)
    made = [
        registry.register("m", make_package(tmp_path / str(n), float(n)), REPORT, LINEAGE)
        for n in range(3)
    ]
    events = Events()
    context = Context("m", home, reporter=events)

    def promote(version: ModelVersion, passed: bool) -> None:
        judged = {"gain": 0.1, "champion_version": registry.aliases("m").get("champion")}
        decision = GateDecision(passed=passed, reason="because", evidence=judged)
        assert steps.promote(context, version, decision) == version

    promote(made[0], True)
    assert registry.aliases("m") == {"champion": 1, "first": 1}
    promote(made[1], False)
    assert registry.aliases("m") == {"champion": 1, "first": 1}
    promote(made[2], True)
    promote(made[2], True)
    assert registry.aliases("m") == {"champion": 3, "first": 1}
    stale = GateDecision(passed=True, reason="better", evidence={"champion_version": 1})
    steps.promote(context, made[1], stale)
    assert registry.aliases("m") == {"champion": 3, "first": 1}
    assert events.found[-1][0] == "rejection"
    assert "version 3 became champion after" in events.found[-1][1]["reason"]
    kinds = [(kind, data.get("previous")) for kind, data in events.found]
    assert kinds[:3] == [("promotion", None), ("rejection", None), ("promotion", 1)]
    assert events.found[0][1]["evidence"] == {"gain": 0.1, "champion_version": None}


def test_the_step_records_its_decision():
    events = Events()
    report = Report(rows=10, positives=5, auc=0.9, log_loss=0.1, calibration_error=0)
    from pathlib import Path

    decision = steps.gate(Context("m", Home(Path("/none")), reporter=events), report, None, Gate())
    assert decision.passed
    assert events.found == [
        ("gate", {"passed": True, "reason": decision.reason, "evidence": decision.evidence})
    ]


def test_a_champion_that_has_seen_the_rows_cannot_be_compared():
    challenger = Report(rows=10, positives=5, auc=0.9, log_loss=0.4, calibration_error=0.1)
    seen = challenger.model_copy(update={"auc": 0.5, "has_seen": True, "version": 4})
    decision = decide(challenger, seen, Gate())
    assert not decision.passed
    assert "was trained on rows that judge it" in decision.reason
    assert decision.evidence["champion_version"] == 4
