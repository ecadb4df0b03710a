"""The way from a replica to the monitor: a named Ray actor, which may not be there."""

from __future__ import annotations

import time
from typing import Any

from mlops_ray.metadata.delta import MONITOR_ACTOR, MONITOR_NAMESPACE, Delta

CONFIRM_TIMEOUT_S = 10.0
LOOK_AGAIN_S = 5.0


class MonitorSink:
    """Sends deltas to the monitor of a project, calling its method ``observe(delta)``.

    Without a monitor, deltas are dropped: the prediction log on disk holds the rows. Called from the
    thread that flushes, never from a request.
    """

    def __init__(self, project: str) -> None:
        self._name = MONITOR_ACTOR.format(project=project)
        self._actor: Any = None
        self._look_at_s = 0.0

    def __call__(self, delta: Delta, confirm: bool) -> None:
        """Send a delta; with ``confirm``, wait until the monitor has taken it in.

        Raises:
            RayError: the monitor died, or did not answer within ``CONFIRM_TIMEOUT_S``.
        """
        import ray
        from ray.exceptions import RayError

        actor = self._find(confirm)
        if actor is None:
            return
        try:
            sent = actor.observe.remote(delta)
            if confirm:
                ray.get(sent, timeout=CONFIRM_TIMEOUT_S)
        except RayError:
            self._actor = None
            raise

    def _find(self, now: bool) -> Any:
        import ray

        if self._actor is None and (now or time.monotonic() >= self._look_at_s):
            self._look_at_s = time.monotonic() + LOOK_AGAIN_S
            try:
                self._actor = ray.get_actor(self._name, namespace=MONITOR_NAMESPACE)
            except ValueError:
                return None
        return self._actor
