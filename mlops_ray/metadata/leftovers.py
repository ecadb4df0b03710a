"""What trainings and reproductions leave in the home: checkpoints, drafts, folders of the dead."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mlops_ray.metadata.home import Home
from mlops_ray.metadata.records import RunRecord
from mlops_ray.metadata.retention import Policy

_OF_RUN = re.compile(r"(\d{8}-\d{6}-[0-9a-f]{4})-")


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing needs, its size in bytes, and why not."""

    path: Path
    size: int
    reason: str


def find_leftovers(
    home: Home, runs: Iterable[RunRecord], policy: Policy, now: datetime
) -> list[Leftover]:
    """Return the folders of trainings whose run has succeeded, or ended long ago, and those of
    reproductions whose process was killed.

    A run that failed may be resumed from its checkpoints as long as its artifacts are kept.
    """
    before_s = (now - policy.grace).timestamp()
    abandoned = [p for p in sorted(home.reproductions.glob("*")) if _changed_s(p) < before_s]
    found = [Leftover(p, _size(p), "nobody finished this reproduction") for p in abandoned]
    return found + _of_trainings(home, runs, policy, now)


def _of_trainings(
    home: Home, runs: Iterable[RunRecord], policy: Policy, now: datetime
) -> list[Leftover]:
    by_id = {run.run_id: run for run in runs}
    found = []
    for path in sorted(home.training.glob("*")):
        match = _OF_RUN.match(path.name)
        run = by_id.get(match[1]) if match else None
        if run is None or run.ended_at is None or run.status == "running":
            continue
        age = now - run.ended_at
        if run.status == "succeeded" and age > policy.grace:
            found.append(Leftover(path, _size(path), f"run {run.run_id} has succeeded"))
        elif age > max(policy.older_than, policy.grace):
            found.append(Leftover(path, _size(path), f"run {run.run_id} ended long ago"))
    return found


def remove_leftovers(leftovers: Iterable[Leftover]) -> None:
    """Remove folders; what cannot be removed stays."""
    for leftover in leftovers:
        shutil.rmtree(leftover.path, ignore_errors=True)


def _changed_s(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
