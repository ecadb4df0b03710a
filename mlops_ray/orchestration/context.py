"""What a step is given beside its inputs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlops_ray.metadata.home import Home
from mlops_ray.metadata.records import LinkKind


class Reporter(Protocol):
    """Where a step reports what it does while it runs."""

    def progress(self, *, rows: int | None = None, message: str = "") -> None:
        """Say how many rows are done and what is happening. Cheap: may be called often."""

    def metric(self, name: str, value: float) -> None:
        """Record a metric of this step."""

    def param(self, name: str, value: Any) -> None:
        """Record a parameter of this step."""

    def event(self, kind: str, **data: Any) -> None:
        """Append a fact to the ledger: a decision with its evidence, a promotion, a trigger."""

    def reads(self, kind: LinkKind, name: str) -> None:
        """Say for lineage that this step reads something by name: ``view``, ``weather@14``."""

    def writes(self, kind: LinkKind, name: str) -> None:
        """Say for lineage that this step has made something by name: ``model``, ``flights@7``."""


class Silent:
    """A reporter that records nothing: for calling a step as a plain function."""

    def progress(self, *, rows: int | None = None, message: str = "") -> None:
        """Record nothing."""

    def metric(self, name: str, value: float) -> None:
        """Record nothing."""

    def param(self, name: str, value: Any) -> None:
        """Record nothing."""

    def event(self, kind: str, **data: Any) -> None:
        """Record nothing."""

    def reads(self, kind: LinkKind, name: str) -> None:
        """Record nothing."""

    def writes(self, kind: LinkKind, name: str) -> None:
        """Record nothing."""


@dataclass(frozen=True)
class Context:
    """The facilities of a run, given to each step that declares a parameter ``context: Context``.

    It holds no configuration: what a step depends on comes in through its declared inputs, so that
    the cache key of the step is complete.

    ``command`` is the argument vector that runs a workflow of this project as it is configured now;
    a step that starts a further run appends ``workflow=NAME`` and other overrides to it. ``item`` is
    the position of a mapped step's call in its list; −1 for other steps.
    """

    project: str
    home: Home
    run_id: str = "adhoc"
    step: str = "adhoc"
    reporter: Reporter = field(default_factory=Silent)
    command: tuple[str, ...] = ()
    item: int = -1

    def scratch(self) -> Path:
        """Return an empty folder for this step's files; it is removed when the step is over."""
        folder = self.scratch_path
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    @property
    def scratch_path(self) -> Path:
        """Where ``scratch`` makes its folder."""
        folder = self.home.run(self.run_id) / "scratch" / self.step
        return folder if self.item < 0 else folder / str(self.item)
