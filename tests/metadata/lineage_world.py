"""Ledgers' records of projects that run for some days, made up."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.records import Link, RunRecord, StepRecord

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
INPUTS: dict[str, dict[str, str]] = {
    "extract": {},
    "clean": {"raw": "extract"},
    "materialize": {"tables": "clean"},
    "training_set": {"tables": "clean", "versions": "materialize"},
    "split": {"data": "training_set"},
    "fit": {"data": "split"},
    "evaluate": {"package": "fit", "data": "split"},
    "champion": {"data": "split"},
    "gate": {"report": "evaluate", "against": "champion"},
    "register": {"package": "fit", "report": "evaluate"},
    "promote": {"version": "register", "decision": "gate"},
    "deploy": {},
}
KINDS = {
    "extract": "tree",
    "clean": "tree",
    "training_set": "table",
    "split": "table",
    "fit": "tree",
}


class World:
    """Runs of the workflow ``train`` and ``deploy``, one a day."""

    def __init__(self) -> None:
        self.runs: list[RunRecord] = []
        self.steps: list[StepRecord] = []
        self.links: list[Link] = []
        self.parts: dict[str, dict[str, Any]] = {}

    def day(self, number: int, cached: frozenset[str] = frozenset()) -> str:
        """Add a run in which the named steps are cached from the day before."""
        run_id = f"{NOON + timedelta(days=number):%Y%m%d-%H%M%S}-{number:04x}"
        at = NOON + timedelta(days=number)
        self.runs.append(
            RunRecord(
                run_id=run_id,
                project="flights",
                workflow="loop",
                status="succeeded",
                config_digest="",
                started_at=at,
                ended_at=at,
                owner="",
                config={},
                provenance={"commit": "0123abcd"},
            )
        )
        for position, (name, inputs) in enumerate(INPUTS.items()):
            day = number - 1 if name in cached else number
            key, digest = (
                hashlib.blake2b(f"{name}{day}{what}".encode(), digest_size=32).hexdigest()
                for what in ("key", "output")
            )
            kind: Any = KINDS.get(name, "json")
            self.parts[key] = {
                "target": name,
                "inputs": {p: {"step": s, "digest": ""} for p, s in inputs.items()},
            }
            self.steps.append(
                StepRecord(
                    run_id=run_id,
                    name=name,
                    position=position,
                    status="cached" if name in cached else "succeeded",
                    key=key,
                    output=ArtifactRef(digest=digest, kind=kind, size=1000 * (position + 1) ** 3),
                    ended_at=at + timedelta(minutes=position),
                )
            )
        self._link(run_id, number)
        return run_id

    def _link(self, run_id: str, day: int) -> None:
        views = ("weather", "airline_history", "plane_history")
        said = [("extract", "reads", "source", name) for name in ("flights", "weather")]
        said += [("materialize", "writes", "view", f"{view}@{day}") for view in views]
        if day:
            said += [("materialize", "reads", "view", f"{view}@{day - 1}") for view in views]
            said += [("champion", "reads", "model", f"flights@{day}")]
        said += [("training_set", "reads", "view", f"{view}@{day}") for view in views]
        said += [("register", "writes", "model", f"flights@{day + 1}")]
        said += [(step, "reads", "model", f"flights@{day + 1}") for step in ("promote", "deploy")]
        said += [("deploy", "writes", "deployment", "flights")]
        self.links += [
            Link(run_id=run_id, step=s, direction=d, kind=k, name=n)  # type: ignore[arg-type]
            for s, d, k, n in said
        ]
