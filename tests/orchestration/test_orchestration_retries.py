"""Whose fault an error is, what another try costs, and how long to wait before it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import exceptions as ray_errors

from mlops_ray.config.workflow import Backoff, Retries
from mlops_ray.errors import ArtifactError, LedgerError, StorageError, WorkflowError
from mlops_ray.orchestration.retries import Budget, classify, delay_s, digest_of, headline


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("mine"), "user"),
        (SystemExit(3), "user"),
        (WorkflowError("input does not fit"), "user"),
        (ArtifactError("a value of this type cannot be stored"), "user"),
        (ray_errors.RayTaskError("f", "trace", ValueError("of a nested task")), "user"),
        (ArtifactError("it is missing", digest="ab"), "infrastructure"),
        (StorageError("disk full"), "infrastructure"),
        (LedgerError("locked"), "infrastructure"),
        (MemoryError(), "infrastructure"),
        (ray_errors.WorkerCrashedError(), "infrastructure"),
        (ray_errors.OutOfMemoryError("too much"), "infrastructure"),
        (ray_errors.RuntimeEnvSetupError("no such package"), "infrastructure"),
        (ray_errors.ActorDiedError(), "infrastructure"),
        (ray_errors.NodeDiedError("gone"), "preemption"),
        (ray_errors.RayActorError(preempted=True), "preemption"),
        (
            ray_errors.RayActorError(error_msg="The actor died because its node has died."),
            "preemption",
        ),
    ],
)
def test_errors_have_causes(error: BaseException, cause: str) -> None:
    assert classify(error) == cause


def test_of_a_workers_error_one_hears_what_was_raised_without_colours() -> None:
    text = "\x1b[36mray::shop.fit()\x1b[39m (pid=1)\n  File x\nCancelledError: nope"
    assert headline(ray_errors.RayTaskError("f", text, ValueError("mine"))) == "ValueError: mine"
    assert headline(ray_errors.RayTaskError("f", text, None)).endswith("CancelledError: nope")  # type: ignore[arg-type]
    assert headline(RuntimeError("\x1b[31mred\x1b[0m\nmore")) == "RuntimeError: red"


def test_only_lost_artifacts_can_be_made_again() -> None:
    assert digest_of(ArtifactError("it is missing", digest="ab")) == "ab"
    assert digest_of(StorageError("the disk says no", digest="ab")) is None
    assert digest_of(ValueError()) is None


def test_each_cause_has_a_budget_of_its_own() -> None:
    budget = Budget(Retries(user=1, infrastructure=2, preemption=0))
    assert [budget.spend("user"), budget.spend("user")] == [1, None]
    assert [budget.spend("infrastructure") for _ in range(3)] == [1, 2, None]
    assert budget.spend("preemption") is None


@settings(deadline=None)
@given(
    first=st.floats(0, 100),
    factor=st.floats(1, 10),
    most=st.floats(0, 1000),
    jitter=st.floats(0, 1),
    tries=st.integers(1, 2000),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_waits_grow_to_a_limit_less_the_jitter(
    first: float, factor: float, most: float, jitter: float, tries: int, chance: float
) -> None:
    backoff = Backoff(
        first=timedelta(seconds=first),
        factor=factor,
        most=timedelta(seconds=most),
        jitter=jitter,
    )
    full = backoff.first.total_seconds()
    for _ in range(min(tries - 1, 400)):
        full = min(full * factor, 1e6)
    full = min(full, backoff.most.total_seconds())
    waits = delay_s(backoff, tries, chance)
    if tries <= 400:
        assert waits == pytest.approx(full * (1 - jitter * chance))
    assert 0 <= waits <= most + 1e-6
