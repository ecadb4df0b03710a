"""When a version counts as identical."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlops_ray.delivery import verdict
from mlops_ray.delivery.rerun import Answer, Result
from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.home import Home

PACKAGE = ArtifactRef(digest="a" * 64, kind="tree", size=1)
REPORTS = {n: ArtifactRef(digest=n[-1] * 64, kind="json", size=1) for n in ("report1", "report2")}


def judged(monkeypatch: pytest.MonkeyPatch, metrics: tuple[str, ...], reached: list[str]) -> bool:
    """Judge a version whose steps all gave what they had given; ``reached`` names those that ran."""
    outputs = {"fit": PACKAGE, **REPORTS}
    case: Any = SimpleNamespace(
        package="fit", metrics=metrics, weights="w", again=(), output=outputs.__getitem__
    )
    steps = {name: Result(status="succeeded", output=outputs[name]) for name in ("fit", *reached)}
    monkeypatch.setattr(verdict, "_weights", lambda home, package: "w")
    prepared: Any = SimpleNamespace(home=None)
    home: Any = Home
    return verdict.judge(
        case, home, prepared, Answer(run_id="r", succeeded=True, steps=steps)
    ).identical


@pytest.mark.parametrize(
    ("metrics", "reached", "identical"),
    [
        (["report1"], ["report1"], True),
        (["report1"], [], False),
        (["report1", "report2"], ["report1", "report2"], True),
        (["report1", "report2"], ["report2"], False),
        ([], [], False),
    ],
)
def test_weights_and_all_metrics_must_have_come_out(
    monkeypatch: pytest.MonkeyPatch, metrics: list[str], reached: list[str], identical: bool
) -> None:
    assert judged(monkeypatch, tuple(metrics), reached) is identical
