"""What a run is made from: everything that the executor needs to know, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mlops_ray.config.check import allowed_packages
from mlops_ray.config.project import Project
from mlops_ray.config.workflow import Workflow
from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.home import Home

_NOT_OF_THE_RESULT = {"home", "cluster", "triggers", "webhook"}


@dataclass(frozen=True)
class RunSpec:
    """A workflow to run and what goes with it.

    Args:
        project: The project's name.
        workflow: What to run.
        home: Where state is kept.
        config: The whole configuration, recorded with the run.
        config_digest: Digest of what of it decides results: runs of the same workflow with the same
            digest are the same *instance*, of which at most one runs at a time.
        packages: Packages that dotted names may point into; their code counts for cache keys.
        directory: The working directory; provenance looks for git and the lock file there.
        roots: Folders that hold the project's code.
        command: How to run a workflow of this project again, see ``Context``.
        reason: Who or what asked for the run.
        given: Steps that are not run: their outputs, which are in the home's store, are facts.
        only: The steps that are wanted, with what they need; empty: all.
    """

    project: str
    workflow: Workflow
    home: Home
    config: dict[str, Any] = field(default_factory=dict)
    config_digest: str = ""
    seed: int = 0
    packages: tuple[str, ...] = ()
    directory: Path = Path()
    roots: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    reason: str = "by hand"
    given: Mapping[str, ArtifactRef] = field(default_factory=dict)
    only: frozenset[str] = frozenset()

    @classmethod
    def of(cls, project: Project, **more: Any) -> Self:
        """Return the spec of a project as it is configured; ``more`` are the other fields."""
        return cls(
            project=project.name,
            workflow=project.workflow,
            home=Home(project.home),
            config=project.model_dump(mode="json", by_alias=True),
            config_digest=config_digest(project),
            seed=project.seed,
            packages=packages_of(project),
            **more,
        )

    @property
    def instance_digest(self) -> str:
        """``config_digest``; of a part of the workflow together with what part it is, so that it
        neither goes on with a run of the whole nor is taken up as one."""
        if not self.only and not self.given:
            return self.config_digest
        given = {name: ref.digest for name, ref in self.given.items()}
        return digest_json([self.config_digest, sorted(self.only), given])

    @property
    def instance(self) -> str:
        """The name of the lease that a run of this holds."""
        return instance_name(self.project, self.workflow.name, self.instance_digest)


def instance_name(project: str, workflow: str, config_digest: str) -> str:
    """Name a workflow with its configuration: the lease that a run of it holds."""
    return f"{project}/{workflow}/{config_digest[:16]}"


def packages_of(project: Project) -> tuple[str, ...]:
    """Return the packages whose code counts for cache keys."""
    return tuple(allowed_packages({"package": project.package, "allow": list(project.allow)}))


def config_digest(project: Project) -> str:
    """Digest everything that decides results: all but where state is kept and which Ray is used."""
    return digest_json(project.model_dump(mode="json", by_alias=True, exclude=_NOT_OF_THE_RESULT))
