"""A Serve application from a project's folder alone: for `serve deploy` and KubeRay's RayService."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mlops_ray.config.locate import open_workspace
from mlops_ray.delivery.rollout import models_of
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.load import load_project
from mlops_ray.serving.deployment import app
from mlops_ray.serving.deployment.deploy import options_of, settings_of
from mlops_ray.serving.models.served import ServedModels


class Arguments(BaseModel):
    """Which project, where, and the registry aliases to serve: the first answers."""

    directory: Path
    overrides: list[str] = []
    aliases: list[str] = ["champion"]


def build(args: dict[str, Any]) -> Any:
    """Return the application of a project with the versions that its aliases name now.

    Unlike the step ``deploy``, nothing is swapped in place: a change is a new build.

    Raises:
        ConfigError: The project's configuration has problems.
        RegistryError: The first alias is not set.
    """
    wanted = Arguments.model_validate(args)
    workspace = open_workspace(wanted.directory)
    project = load_project(workspace, wanted.overrides)
    context = Context(project.name, Home(project.home))
    service, models, _ = models_of(context, project.name, project.features, wanted.aliases)
    roots = [str(root) for root in workspace.projects]
    settings = settings_of(
        project.name, context.home, project.serving, project.features, service, models, roots
    )
    served = ServedModels.of(models, project.serving.routing)
    arguments = settings.model_dump(mode="json", by_alias=True)
    return app.bind(arguments, options_of(project.serving, settings, served))
