"""Running a workflow of a project from here: what the verb ``run`` and ``Session.run`` both do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlops_ray.cluster.command import run_command
from mlops_ray.cluster.connect import connect, resolve_address
from mlops_ray.config.locate import Workspace
from mlops_ray.config.project import Project
from mlops_ray.metadata.records import RunRecord
from mlops_ray.orchestration.spec import RunSpec
from mlops_ray.orchestration.triggers import REASON_VARIABLE

if TYPE_CHECKING:
    from mlops_ray.orchestration.executor import Executor
    from mlops_ray.orchestration.recording import Listener


def spec_of(workspace: Workspace, project: Project, overrides: Sequence[str]) -> RunSpec:
    """Return what a run of a project's workflow is made from.

    Args:
        workspace: Where the project is.
        project: What to run, as it is configured.
        overrides: The Hydra overrides that it was configured with.
    """
    return RunSpec.of(
        project,
        directory=workspace.directory,
        roots=tuple(str(root) for root in workspace.projects),
        command=run_command(workspace.directory, Path(project.home), overrides),
        reason=os.environ.get(REASON_VARIABLE) or "by hand",
    )


def run_workflow(
    workspace: Workspace,
    project: Project,
    overrides: Sequence[str],
    *,
    fresh: bool = False,
    listener: Listener | None = None,
    say: Callable[[str], Any] = lambda _text: None,
) -> tuple[Executor, RunRecord]:
    """Join or start Ray and run a project's workflow to its end; an unfinished run goes on.

    Args:
        workspace: Where the project is.
        project: What to run, as it is configured.
        overrides: The Hydra overrides that it was configured with.
        fresh: Begin a new run, also where one could go on.
        listener: Called about four times a second with the run and its steps.
        say: Called with what is being done before there are steps.

    Raises:
        ClusterError: Ray cannot be started or joined.
        StepError: A step failed.
        WorkflowError: The workflow cannot run now, see ``Executor.run``.
    """
    local = resolve_address(project.cluster) == "local"
    say("starting Ray" if local else "joining Ray")
    connect(project.cluster, roots=workspace.projects)
    from mlops_ray.orchestration.executor import Executor

    executor = Executor(spec_of(workspace, project, overrides), listener=listener)
    return executor, executor.run(fresh=fresh)
