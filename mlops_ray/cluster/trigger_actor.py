"""The detached actor that keeps a project's triggers, and how to reach it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlops_ray.cluster.command import run_command
from mlops_ray.cluster.observations import ProjectWorld
from mlops_ray.cluster.triggers import Dispatcher, TriggersSpec
from mlops_ray.cluster.webhook import WebhookServer
from mlops_ray.config.locate import Workspace
from mlops_ray.config.project import Project
from mlops_ray.config.triggers import Webhook
from mlops_ray.errors import ClusterError, MlopsRayError
from mlops_ray.metadata.access import open_ledger
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.orchestration.jobs import (
    JobCommand,
    Jobs,
    RayJobs,
    shipped_directory,
    told_environment,
)

logger = logging.getLogger(__name__)

ACTOR = "trigger/{project}"
NAMESPACE = "mlops_ray"
CONFIGURED = "triggers_configured"
STARTED = "triggers_started"

_TICK_S = 1.0
_MOMENT_S = 0.02
_THREADS = 8

Clock = Callable[[], datetime]
JobsFactory = Callable[[], Jobs]


def wall_clock() -> datetime:
    """Return the present moment, in UTC."""
    return datetime.now(UTC)


class TriggerActor:
    """A dispatcher in a process of its own, which Ray starts again when it dies.

    What it does is in the ledger: the newest event ``triggers_configured`` of the project.
    """

    def __init__(
        self,
        home: Home,
        project: str,
        variables: dict[str, str],
        clock: Clock = wall_clock,
        jobs: JobsFactory = RayJobs,
    ) -> None:
        import ray

        self._variables = variables
        self._home = home
        self._project = project
        self._clock = clock
        self._jobs = jobs()
        self._owner = f"actor {ray.get_runtime_context().get_actor_id()}"
        self._ledger = open_ledger(home)
        self._turn = threading.RLock()
        self._server: WebhookServer | None = None
        self._problem = ""
        self._url = ""
        self._over = threading.Event()
        self.configure()
        threading.Thread(target=self._work, name="triggers", daemon=True).start()

    def was_told(self, variables: dict[str, str]) -> bool:
        """Say whether its environment holds these variables, for its life: also after a death."""
        return self._variables == variables

    def configure(self) -> dict[str, Any]:
        """Follow what the ledger says from now on; return the status."""
        spec = configured(self._ledger, self._project)
        world = ProjectWorld(
            spec.project.features,
            self._home.offline(self._project),
            Path(spec.directory),
        )
        told = spec.command.with_more(**told_environment())
        with self._turn:
            if self._server is not None:
                self._server.close()
                self._server = None
            self._dispatcher = Dispatcher(
                spec.model_copy(update={"command": told}),
                self._ledger,
                self._jobs,
                world,
                owner=self._owner,
                clock=self._clock,
            )
            self._listen(spec.project.webhook)
            data = {"url": self._url, "node": socket.gethostname(), "pid": os.getpid()}
            self._ledger.append(self._project, STARTED, data)
        return self.status()

    def status(self) -> dict[str, Any]:
        """Return whether this actor acts, its process, the webhooks' address, and its troubles."""
        with self._turn:
            status = self._dispatcher.status()
            if self._problem:
                status["troubles"]["webhook"] = self._problem
            return status | {"url": self._url, "pid": os.getpid()}

    def close(self) -> None:
        """Leave the triggers to another at once; jobs go on."""
        self._over.set()
        with self._turn:
            if self._server is not None:
                self._server.close()
                self._server = None
            self._dispatcher.close()

    def _listen(self, webhook: Webhook) -> None:
        self._url = self._problem = ""
        names = self._dispatcher.webhooks
        secret = os.environ.get(webhook.secret, "")
        if not names:
            return
        if not secret:
            self._problem = f"no requests are taken: the environment has no {webhook.secret}"
            return
        server = WebhookServer(webhook, secret, names, self._dispatcher.deliver)
        try:
            self._url = server.start()
            self._server = server
        except ClusterError as error:
            self._problem = str(error)

    def _work(self) -> None:
        while not self._over.wait(_TICK_S):
            try:
                with self._turn:
                    self._dispatcher.tick()
            except MlopsRayError:
                logger.exception("the triggers could not be looked after; tried again")
            except Exception:
                logger.exception("unexpected error in the triggers; tried again")


def configured(ledger: Ledger, project: str) -> TriggersSpec:
    """Return what the triggers of a project were last told.

    Raises:
        ClusterError: They were never started, or were told something that is not understood.
    """
    events = ledger.events(project=project, kind=CONFIGURED)
    if not events:
        raise ClusterError(
            f"the triggers of project {project!r} were never started",
            fix="start them: `mlops-ray triggers start`",
        )
    try:
        return TriggersSpec.model_validate(events[-1].data)
    except ValidationError as error:
        raise ClusterError(
            f"what the triggers of project {project!r} were told is not understood",
            why=str(error).splitlines()[-1].strip(),
            fix="start them again, with this version: `mlops-ray triggers start`",
        ) from error


def ensure(
    home: Home, spec: TriggersSpec, clock: Clock = wall_clock, jobs: JobsFactory = RayJobs
) -> Any:
    """Return the project's running actor, started or told anew what ``spec`` says.

    One whose webhook secret, or whose variables, are no longer those of this process is replaced.
    ``clock`` and ``jobs`` are what a new one tells the time by and runs jobs with.

    Raises:
        LedgerError: The ledger cannot be written.
    """
    import ray

    project = spec.project
    ledger = open_ledger(home)
    told = spec.model_dump(mode="json", by_alias=True)
    known = ledger.events(project=project.name, kind=CONFIGURED)
    if not known or known[-1].data != told:
        ledger.append(project.name, CONFIGURED, told)
    secret = project.webhook.secret
    variables = told_environment()
    variables |= {secret: os.environ[secret]} if secret in os.environ else {}
    actor: Any = ray.remote(TriggerActor).options(
        name=ACTOR.format(project=project.name),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=_THREADS,
        num_cpus=0,
        runtime_env={"env_vars": variables},
    )
    handle = actor.remote(home, project.name, variables, clock, jobs)
    if not ray.get(handle.was_told.remote(variables)):
        stop(project.name)
        handle = actor.remote(home, project.name, variables, clock, jobs)
    ray.get(handle.configure.remote())
    return handle


def spec_of(workspace: Workspace, project: Project, overrides: Sequence[str]) -> TriggersSpec:
    """Return what the triggers of a project are told. This process is connected to Ray.

    ``overrides`` are those that the project was loaded with; its workflow does not matter.
    """
    return TriggersSpec(
        project=project,
        directory=str(workspace.directory),
        command=JobCommand(
            argv=run_command(workspace.directory, project.home, overrides),
            directory=shipped_directory(),
        ),
    )


def find(project: str) -> Any:
    """Return the project's trigger actor.

    Raises:
        ClusterError: It does not run on this cluster.
    """
    import ray

    try:
        return ray.get_actor(ACTOR.format(project=project), namespace=NAMESPACE)
    except ValueError as error:
        raise ClusterError(
            f"no triggers run for project {project!r} on this cluster",
            fix="start them: `mlops-ray triggers start`",
        ) from error


def stop(project: str) -> None:
    """End the project's trigger actor for good; what is due is kept, jobs go on.

    Raises:
        ClusterError: It does not run on this cluster.
    """
    import ray

    handle = find(project)
    ray.get(handle.close.remote())
    ray.kill(handle, no_restart=True)
    with contextlib.suppress(ClusterError):
        while find(project) == handle:  # its name is free a moment later
            time.sleep(_MOMENT_S)
