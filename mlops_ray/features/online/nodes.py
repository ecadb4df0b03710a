"""A copy of the online store on each machine of a cluster, for the replicas there."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

from mlops_ray.config.features import Features
from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online.opening import open_online
from mlops_ray.features.online.protocol import OnlineStore
from mlops_ray.metadata.files import write_whole
from mlops_ray.metadata.home import Home

logger = logging.getLogger(__name__)

NAMESPACE = "mlops-ray"
_ACTOR = "mlops-ray-online:{project}:{node}"


class NodeCopy:
    """Keeps a machine's copy of a project's online store up with the offline store.

    It is the only writer of its folder. What is in the copy survives it, so one that Ray has
    restarted goes on by commit, with the declarations that it followed last.

    Args:
        features: The declarations.
        root: Of the home, which all machines share.
        project: The project's name.
    """

    def __init__(self, features: Features, root: str, project: str) -> None:
        self._home = Home(Path(root))
        self._project = project
        self._working = threading.Lock()
        self._features = _followed(features, project) or features
        threading.Thread(target=self._tick, name="tick", daemon=True).start()

    def follow(self, features: Features) -> dict[str, int]:
        """Keep these views from now on; return, when they are filled, the rows written of each."""
        write_whole(_record(features, self._project), features.model_dump_json().encode())
        self._features = features
        return self.catch_up()

    def catch_up(self) -> dict[str, int]:
        """Take what was committed since; return the rows written of each view."""
        features = self._features
        return {view: self._take(features, view) for view in features.views}

    def _take(self, features: Features, view: str) -> int:
        with self._working:
            offline = OfflineStore(self._home.offline(self._project), features)
            online = open_online(features, _folder(features, self._project), self._project)
            return materialize_view(offline, online, view)

    def keep_up(self) -> None:
        """Do the same; where it fails the view stays as it is, and the log says why."""
        features = self._features
        for view in features.views:
            try:
                self._take(features, view)
            except Exception:
                # Whatever it was, the next time it may go well.
                logger.exception("the copy of view %s stays as it is", view)

    def _tick(self) -> None:
        while True:
            time.sleep(self._features.online.copy_every.total_seconds())
            self.keep_up()


def open_near(features: Features, home: Home, project: str) -> OnlineStore:
    """Open the online store that is nearest for reading: the server, the folder, or this node's copy.

    The first call on a node of a Ray cluster starts the copy's actor there and waits until the copy
    is filled.

    Raises:
        FeatureStoreError: There is none yet, or it cannot be reached.
    """
    if features.online.store == "redis" or not features.online.copies:
        return open_online(features, home.online(project), project, readonly=True)
    import ray

    ray.get(ensure_copy(features, home, project).follow.remote(features))
    return open_online(features, _folder(features, project), project, readonly=True)


def ensure_copy(features: Features, home: Home, project: str) -> Any:
    """Return the actor that keeps the copy of the node on which this is called."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    made: Any = ray.remote(NodeCopy)
    return made.options(
        name=_ACTOR.format(project=project, node=node),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=4,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(features, str(home.root), project)


def _folder(features: Features, project: str) -> Path:
    return Path(features.online.copies) / project


def _record(features: Features, project: str) -> Path:
    return _folder(features, project) / "features.json"


def _followed(features: Features, project: str) -> Features | None:
    """Return the declarations that the copy was last kept by, None where there is none."""
    try:
        return Features.model_validate_json(_record(features, project).read_bytes())
    except (OSError, ValueError):
        return None
