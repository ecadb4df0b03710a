"""The steps of delivery: judging a challenger and making it the champion."""

from __future__ import annotations

from mlops_ray.config.training import Gate
from mlops_ray.delivery.gate import decide
from mlops_ray.delivery.rollout import deploy
from mlops_ray.metadata.types import GateDecision, ModelVersion, Report
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.marks import effect

__all__ = ["deploy", "gate", "promote"]

CHAMPION = "champion"
FIRST = "first"


@effect
def gate(context: Context, report: Report, against: Report | None, gate: Gate) -> GateDecision:
    """Decide whether a challenger may replace the champion, and record the decision."""
    decision = decide(report, against, gate)
    context.reporter.event(
        "gate", passed=decision.passed, reason=decision.reason, evidence=decision.evidence
    )
    return decision


@effect
def promote(context: Context, version: ModelVersion, decision: GateDecision) -> ModelVersion:
    """Move the alias ``champion`` to a version that passed, and leave it where it did not.

    The first champion of a model also gets the alias ``first``, which never moves.

    Raises:
        RegistryError: The version is not in the registry.
    """
    from mlops_ray.registry.registry import Registry

    context.reporter.reads("model", f"{version.name}@{version.version}")
    if not decision.passed:
        context.reporter.event(
            "rejection", model=version.name, version=version.version, reason=decision.reason
        )
        return version
    registry = Registry(context.home)
    aliases = registry.aliases(version.name)
    current = aliases.get(CHAMPION)
    if current not in (None, version.version, decision.evidence.get("champion_version")):
        reason = f"version {current} became champion after the challenger was judged"
        context.reporter.event(
            "rejection", model=version.name, version=version.version, reason=reason
        )
        return version
    registry.set_alias(version.name, CHAMPION, version.version)
    if FIRST not in aliases:
        registry.set_alias(version.name, FIRST, version.version)
    context.reporter.event(
        "promotion",
        model=version.name,
        version=version.version,
        previous=aliases.get(CHAMPION),
        reason=decision.reason,
        evidence=decision.evidence,
    )
    return version
