"""The Python door: the same projects and workflows as on the command line.

with mlops_ray.connect("project=flights") as flights:
    run = flights.run("train")
    print(run.outputs["evaluate"])
    flights.features.get("weather", {"origin": "JFK"})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlops_ray.config.locate import Workspace, open_workspace
from mlops_ray.config.project import Project
from mlops_ray.config.workflow import Workflow
from mlops_ray.features.plan import FeaturePlan, record
from mlops_ray.features.store import FeatureStore
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.records import RunRecord
from mlops_ray.metadata.types import FeatureVersions
from mlops_ray.orchestration.declare import Declaration
from mlops_ray.orchestration.load import load_project


class Run:
    """A finished run: its record in the ledger, and the outputs of its steps by name."""

    def __init__(self, record: RunRecord, outputs: Mapping[str, Any]) -> None:
        self.record = record
        self.outputs = outputs

    @property
    def run_id(self) -> str:
        """The run's id, as ``mlops-ray status`` shows it."""
        return self.record.run_id


class _Outputs(Mapping[str, Any]):
    """Outputs read from the artifact store when they are asked for."""

    def __init__(self, executor: Any, run_id: str, names: list[str]) -> None:
        self._executor = executor
        self._run_id = run_id
        self._names = names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._executor.output(self._run_id, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ProjectFeatures(FeatureStore):
    """The feature store of a session's project, with what needs a cluster to be done."""

    def __init__(self, session: Session) -> None:
        project = session.project
        super().__init__(project.features, Home(project.home), project.name)
        self._session = session

    def apply(self) -> FeaturePlan:
        """Make the store what the definitions say; return what there was to do.

        Rows that are due are made by the workflow ``features``, which goes on where it was
        interrupted. What is served changes when all rows of a view are there.

        Raises:
            FeatureStoreError: A change cannot be made; nothing was touched.
        """
        plan = self.plan()
        plan.enforce()
        if plan.rows_due:
            self._session.run("features")
        else:
            record(self.features, self.offline)
        return plan

    def materialize(self, until: datetime | str | None = None) -> FeatureVersions:
        """Advance every view to ``until``, offline and online; None: as the project is configured.

        Returns:
            The versions of the views' offline tables.
        """
        moment = until.isoformat() if isinstance(until, datetime) else until
        given = [] if moment is None else [f"until='{moment}'"]
        output = self._session.run("features", *given).outputs["materialize"]
        return FeatureVersions.model_validate(output)


class Session:
    """A project on a Ray cluster. Use it with ``with``: leaving it leaves a joined cluster running
    and ends one that was started here."""

    def __init__(self, workspace: Workspace, overrides: tuple[str, ...]) -> None:
        self._workspace = workspace
        self._overrides = overrides
        self.project: Project = load_project(workspace, list(overrides))
        self.features = ProjectFeatures(self)

    def run(self, workflow: str | Workflow | Declaration, *overrides: str) -> Run:
        """Run a workflow to its end; an unfinished run of it goes on.

        Args:
            workflow: Its name, such as ``train``, or one that is declared in Python.
            overrides: Further Hydra overrides, such as ``training.epochs=2``.

        Raises:
            ConfigError: The configuration has problems.
            StepError: A step failed.
            WorkflowError: The workflow cannot run now: another process runs it, or somebody
                cancelled it.
        """
        from mlops_ray.cluster.running import run_workflow

        chosen = [f"workflow={workflow}"] if isinstance(workflow, str) else []
        given = [*self._overrides, *chosen, *overrides]
        project = load_project(
            self._workspace, given, None if isinstance(workflow, str) else workflow
        )
        executor, record = run_workflow(self._workspace, project, given)
        names = [step.name for step in executor.steps(record.run_id) if step.output is not None]
        return Run(record, _Outputs(executor, record.run_id, names))

    def __enter__(self) -> Self:
        from mlops_ray.cluster.connect import connect as join

        join(self.project.cluster, roots=self._workspace.projects)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import ray

        ray.shutdown()


def connect(*overrides: str, directory: str | Path = ".") -> Session:
    """Open a project; ``overrides`` are those of the command line.

    Raises:
        ConfigError: The configuration has problems; all of them are in the error.
    """
    return Session(open_workspace(Path(directory)), overrides)
