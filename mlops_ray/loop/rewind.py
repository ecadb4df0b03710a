"""Taking a project back to before its first day, so that history can be replayed."""

from __future__ import annotations

import contextlib
import shutil

from mlops_ray.config.features import Features
from mlops_ray.errors import MlopsRayError
from mlops_ray.orchestration.context import Context
from mlops_ray.orchestration.marks import effect


@effect
def rewind(context: Context, project: str, features: Features) -> bool:
    """Forget what a project has learnt of time: feature stores, prediction log, monitor, aliases.

    A replay starts in the past, and stores that have seen its end would leak it. Registered versions,
    runs and artifacts stay: what was done remains known. So do pushed events, from which their views
    are made again; the writer that takes them in is ended. Training manifests go with the tables
    whose versions they pin: a training set of before cannot be made again from a manifest.

    Returns whether there was anything to forget.
    """
    from mlops_ray.delivery.steps import CHAMPION, FIRST
    from mlops_ray.features.online import open_online
    from mlops_ray.features.push import stop_writer
    from mlops_ray.loop.actor import stop
    from mlops_ray.registry.registry import Registry

    home = context.home
    folders = [
        home.offline(project),
        home.online(project),
        home.predictions(project),
        home.monitor(project),
    ]
    _take_down(project)
    for end in (stop, stop_writer):
        with contextlib.suppress(MlopsRayError):
            end(project)
    if features.online.store != "lmdb":
        open_online(features, home.online(project), project).clear()
    known = [folder for folder in folders if folder.exists()]
    if not known:
        return False
    registry = Registry(home)
    for alias in (CHAMPION, FIRST):
        registry.remove_alias(project, alias)
    for folder in known:
        shutil.rmtree(folder)
    context.reporter.event("rewind", removed=[folder.name for folder in known])
    return True


def _take_down(project: str) -> None:
    """An endpoint would go on reading the store that is about to be removed."""
    import ray

    from mlops_ray.serving.deployment.deploy import remove

    with contextlib.suppress(ValueError, MlopsRayError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        remove(project)
