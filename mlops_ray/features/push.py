"""The Ray actor that takes in a project's pushed events, and how to reach it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import open_online
from mlops_ray.features.pushed import PushedFeatures
from mlops_ray.features.sources.events import Rows
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.home import Home

WRITER_NAMESPACE = "mlops-ray"
_WRITER_ACTOR = "mlops-ray-features:{project}"
_TICK_EVERY_S = 1.0
_THREADS = 32
_PATIENCE, _PAUSE_S = 100, 0.1


class FeatureWriter:
    """``PushedFeatures`` in a process of its own. Ray restarts it when it dies; it then goes on."""

    def __init__(self, features: Features, root: str, project: str) -> None:
        home = Home(Path(root))
        self._made_for = _declaration(features, root)
        self._pushed = PushedFeatures(
            features,
            home.events(project),
            OfflineStore(home.offline(project), features),
            open_online(features, home.online(project), project),
        )
        self._ended = threading.Event()
        threading.Thread(target=self._tick, name="tick", daemon=True).start()

    def made_for(self) -> str:
        """Return what stands for the declarations that it works by."""
        return self._made_for

    def push(self, source: str, rows: Rows) -> int:
        """See ``PushedFeatures.push``."""
        return self._pushed.push(source, rows)

    def commit(self) -> None:
        """See ``PushedFeatures.commit``."""
        self._pushed.commit()

    def status(self) -> dict[str, Any]:
        """See ``PushedFeatures.status``."""
        return self._pushed.status()

    def close(self) -> None:
        """Commit and stop ticking; the actor can be killed then."""
        self._ended.set()
        self._pushed.close()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_EVERY_S):
            self._pushed.tick()


def ensure_writer(features: Features, home: Home, project: str) -> Any:
    """Return the project's running writer, started or, where it was declared otherwise, replaced."""
    import ray

    made: Any = ray.remote(FeatureWriter)
    actor = made.options(
        name=_WRITER_ACTOR.format(project=project),
        namespace=WRITER_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=_THREADS,
        num_cpus=0,
    )
    handle = actor.remote(features, str(home.root), project)
    if ray.get(handle.made_for.remote()) != _declaration(features, str(home.root)):
        stop_writer(project)
        handle = actor.remote(features, str(home.root), project)
        ray.get(handle.made_for.remote())
    return handle


def find_writer(project: str) -> Any:
    """Return the project's writer.

    Raises:
        FeatureStoreError: It does not run.
    """
    import ray

    try:
        return ray.get_actor(_WRITER_ACTOR.format(project=project), namespace=WRITER_NAMESPACE)
    except ValueError as error:
        raise FeatureStoreError(
            f"nothing takes in events for project {project!r} on this cluster",
            fix="start it: `mlops-ray run workflow=push`",
        ) from error


def stop_writer(project: str) -> None:
    """End the project's writer for good; what it has taken in is committed."""
    import ray

    handle = find_writer(project)
    ray.get(handle.close.remote())
    ray.kill(handle, no_restart=True)
    # Its name is free a moment later; until then it would be found once more.
    for _ in range(_PATIENCE):
        try:
            find_writer(project)
        except FeatureStoreError:
            return
        time.sleep(_PAUSE_S)


def push_events(features: Features, home: Home, project: str, source: str, rows: Rows) -> int:
    """Send events to the project's writer, started where it does not run yet; return how many.

    They are on disk and seen online then.

    Raises:
        RequestError: An event is not what is declared; ``field`` and ``row`` say where.
        FeatureStoreError: There is no such source.
    """
    import ray
    from ray.exceptions import RayTaskError

    try:
        count: int = ray.get(ensure_writer(features, home, project).push.remote(source, rows))
    except RayTaskError as error:
        raise error.cause from None
    return count


def _declaration(features: Features, root: str) -> str:
    return digest_json([features.model_dump(mode="json"), root])
