"""A project from its files, checked as a whole: the schema's checks and those of its workflow."""

from __future__ import annotations

from mlops_ray.config.check import check_project
from mlops_ray.config.locate import Workspace
from mlops_ray.config.project import Project
from mlops_ray.config.workflow import Workflow
from mlops_ray.errors import Problem
from mlops_ray.orchestration.checks import check_workflow
from mlops_ray.orchestration.declare import Declaration, declared, declared_by


def load_project(
    workspace: Workspace,
    overrides: list[str],
    workflow: Workflow | Declaration | None = None,
) -> Project:
    """Compose and check a project; a ``workflow`` takes the place of the configured one.

    Raises:
        ConfigError: With every problem found, each with its file and line.
    """
    given = declared(workflow) if workflow is not None else None
    return check_project(workspace, overrides, check_workflow, declared_by, given)[0]


def load_with_warnings(workspace: Workspace, overrides: list[str]) -> tuple[Project, list[Problem]]:
    """Compose and check a project; return it with what does not hinder it but looks wrong.

    Raises:
        ConfigError: With every problem found, each with its file and line.
    """
    return check_project(workspace, overrides, check_workflow, declared_by)
