"""The detached actor that runs a project's controller, and how to reach it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from mlops_ray.errors import MlopsRayError, MonitoringError
from mlops_ray.loop.clock import WallClock
from mlops_ray.loop.controller import Controller, ControllerSpec, World
from mlops_ray.loop.state import StateStore
from mlops_ray.loop.world import ServeWorld
from mlops_ray.metadata.delta import MONITOR_ACTOR, MONITOR_NAMESPACE
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.jobs import RayJobs

logger = logging.getLogger(__name__)

_WATCH_EVERY_S = 0.5
_TAKE_IN_EVERY_S = 2.0
_PATIENCE_S = 60.0
_THREADS = 16

Result = TypeVar("Result")
WorldFactory = Callable[[ControllerSpec], World]


class ControllerActor:
    """A controller in a process of its own. Ray restarts it when it dies; it then goes on.

    It runs with several threads: while a tick waits for the replicas, it can be asked how it is.
    """

    def __init__(self, spec: ControllerSpec, world: WorldFactory = ServeWorld) -> None:
        home = Home(Path(spec.home))
        store = StateStore(home.monitor(spec.project))
        self._clock = WallClock()
        self._controller = Controller(spec, store, RayJobs(), world(spec))
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def configure(self, spec: ControllerSpec) -> None:
        """See ``Controller.configure``."""
        if spec != self._controller.spec:
            self._controller.configure(spec)

    def begin(self, session: str, checkpoint: str | None = None) -> dict[str, Any]:
        """See ``Controller.begin``."""
        return self._controller.begin(session, checkpoint)

    def checkpoint(self, name: str) -> None:
        """See ``Controller.checkpoint``."""
        self._controller.checkpoint(name)

    def tick(self, now_iso: str | None = None, start: bool = True) -> dict[str, Any]:
        """See ``Controller.tick``; without a moment, the machine's clock counts."""
        now = datetime.fromisoformat(now_iso) if now_iso else self._clock.now()
        return self._controller.tick(now, start=start)

    def start_retraining(self) -> dict[str, Any]:
        """See ``Controller.start_retraining``."""
        return self._controller.start_retraining()

    def poll(self, now_iso: str) -> dict[str, Any]:
        """See ``Controller.poll``."""
        return self._controller.poll(datetime.fromisoformat(now_iso))

    def status(self) -> dict[str, Any]:
        """See ``Controller.status``."""
        return self._controller.status()

    def history(self, kind: str | None = None) -> list[dict[str, Any]]:
        """See ``Controller.history``."""
        return self._controller.history(kind)

    def rows(self, since_iso: str, until_iso: str) -> pa.Table:
        """See ``Controller.rows``."""
        moments = (datetime.fromisoformat(moment) for moment in (since_iso, until_iso))
        return self._controller.rows(*moments)

    def _watch(self) -> None:
        """Do what is due by the wall's clock; where the clock is virtual, only look after jobs."""
        pause, taken_s = threading.Event(), 0.0
        while not pause.wait(_WATCH_EVERY_S):
            try:
                self._controller.poll()
                if time.monotonic() - taken_s >= _TAKE_IN_EVERY_S:
                    self._controller.take_in()
                    taken_s = time.monotonic()
                if self._controller.spec.clock == "wall":
                    now = self._clock.now()
                    if self._controller.due(now):
                        self._controller.tick(now)
            except MlopsRayError:
                logger.exception("the monitor could not do what was due; it will try again")
            except Exception:
                logger.exception("unexpected error in the monitor; it will try again")


def ensure(spec: ControllerSpec, world: WorldFactory = ServeWorld) -> Any:
    """Return the project's running controller actor, started or reconfigured as ``spec`` says.

    ``world`` makes what a new one reaches outside of itself.
    """
    import ray

    made: Any = ray.remote(ControllerActor)
    actor = made.options(
        name=actor_name(spec.project),
        namespace=MONITOR_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=_THREADS,
        num_cpus=0,
    )
    handle = actor.remote(spec, world)
    ray.get(handle.configure.remote(spec))
    return handle


def find(project: str) -> Any:
    """Return the project's controller actor.

    Raises:
        MonitoringError: It does not run.
    """
    import ray

    try:
        return ray.get_actor(actor_name(project), namespace=MONITOR_NAMESPACE)
    except ValueError as error:
        raise MonitoringError(
            f"no monitor runs for project {project!r} on this cluster",
            fix="start one: `mlops-ray run workflow=monitor`",
        ) from error


def stop(project: str) -> None:
    """End the project's controller actor for good; its memory stays on disk."""
    import ray

    ray.kill(find(project), no_restart=True)


def actor_name(project: str) -> str:
    """Return the name of the project's controller actor."""
    return MONITOR_ACTOR.format(project=project)


class RemoteMonitor:
    """A controller actor as the replay uses it. Calls wait for an actor that is being restarted."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def begin(self, session: str, checkpoint: str | None) -> dict[str, Any]:
        """See ``Controller.begin``."""
        return await self._call(lambda: self._handle.begin.remote(session, checkpoint))

    async def checkpoint(self, name: str) -> None:
        """See ``Controller.checkpoint``."""
        await self._call(lambda: self._handle.checkpoint.remote(name))

    async def tick(self, now: datetime) -> dict[str, Any]:
        """See ``Controller.tick``; a retraining that it decides on is not started yet."""
        return await self._call(lambda: self._handle.tick.remote(now.isoformat(), False))

    async def start_retraining(self) -> dict[str, Any]:
        """See ``Controller.start_retraining``."""
        return await self._call(lambda: self._handle.start_retraining.remote())

    async def poll(self, now: datetime) -> dict[str, Any]:
        """See ``Controller.poll``."""
        return await self._call(lambda: self._handle.poll.remote(now.isoformat()))

    async def history(self) -> list[dict[str, Any]]:
        """See ``Controller.history``."""
        return await self._call(lambda: self._handle.history.remote())

    async def rows(self, since: datetime, until: datetime) -> pa.Table:
        """See ``Controller.rows``."""
        moments = since.isoformat(), until.isoformat()
        return await self._call(lambda: self._handle.rows.remote(*moments))

    async def _call(self, call: Callable[[], Awaitable[Result]]) -> Result:
        from ray.exceptions import ActorUnavailableError, RayActorError

        waited_s = 0.0
        while True:
            try:
                return await call()
            except (ActorUnavailableError, RayActorError):
                # Every method may be repeated: what was done already is not done twice.
                if waited_s >= _PATIENCE_S:
                    raise
                waited_s += 1.0
                await asyncio.sleep(1.0)
