"""Submitting calls to Ray: as tasks, to the actor of a group, or to an actor of their own."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlops_ray.config.workflow import Step
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration import once
from mlops_ray.orchestration.capture import log_path
from mlops_ray.orchestration.deadline import is_struck
from mlops_ray.orchestration.worker import Call, execute

_LOOK_AT_CLUSTER_EVERY_S = 5.0


@dataclass(eq=False)
class Ticket:
    """Calls of one step that were submitted together and run one after the other.

    ``log_bytes`` is how long the log of the first call was when they were submitted. ``stale`` is
    an effect that was begun with another key: its end is waited for, and then it happens again.
    """

    step: str
    calls: tuple[Call, ...]
    log_bytes: int = 0
    once: bool = False
    stale: bool = False
    ref: Any = None
    actor: Any = None


class Group:
    """The actor's class of a group of steps: one process, in which they run one after the other."""

    def run(self, job: bytes, calls: bytes) -> bytes:
        """Run calls, see ``execute``."""
        return execute(job, calls)


class Crew:
    """The Ray side of a run.

    Args:
        project: Its name; tasks are named after it.
        groups: The steps of each group.
        home: Where their logs are.
        deliver: Called in a thread of Ray's with a ticket and what came back: the bytes of its
            outcomes, or an error of Ray's.
    """

    def __init__(
        self,
        project: str,
        run_id: str,
        groups: dict[str, list[Step]],
        home: Home,
        deliver: Callable[[Ticket, Any], None],
    ) -> None:
        self._home = home
        self._project = project
        self._run_id = run_id
        self._group_options = {name: _joint_options(steps) for name, steps in groups.items()}
        self._groups: dict[str, Any] = {}
        self._tasks: dict[str, Any] = {}
        self._deliver = deliver
        self._cpus = 1
        self._looked_s = 0.0

    def submit(self, ticket: Ticket, step: Step, job: bytes) -> None:
        """Submit calls of a step."""
        with contextlib.suppress(FileNotFoundError):
            if step.timeout is not None:
                ticket.log_bytes = self._log(ticket).stat().st_size
        if ticket.once:
            ticket.actor = self._effect(ticket, step)
        elif step.group is not None:
            ticket.actor = self._group(step.group)
        self._run(ticket, step, job)

    def attach(self, ticket: Ticket, step: Step, job: bytes) -> bool:
        """Wait for an effect that an earlier driver has begun; False where its actor is gone."""
        import ray

        name = once.actor_name(self._run_id, ticket.step, ticket.calls[0])
        try:
            ticket.actor = ray.get_actor(name, namespace=once.NAMESPACE)
        except ValueError:
            return False
        self._run(ticket, step, job)
        return True

    def dismiss(self, step: str, call: Call) -> None:
        """End the actor of an effect that has not begun or is over, if an earlier driver left one.

        One that has not begun cannot any more: its driver's lease is ours.
        """
        import ray

        name = once.actor_name(self._run_id, step, call)
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=once.NAMESPACE))

    def cancel(self, ticket: Ticket, *, force: bool) -> None:
        """Interrupt what runs; with ``force`` end its process."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            if ticket.actor is None or not force:
                ray.cancel(ticket.ref, force=force)
            else:
                ray.kill(ticket.actor)

    def release(self, ticket: Ticket, *, failed: bool) -> None:
        """Let go of what a ticket used, once its end is recorded."""
        import ray

        if ticket.once and ticket.actor is not None:
            ray.kill(ticket.actor)
        elif failed:
            self._groups = {k: v for k, v in self._groups.items() if v is not ticket.actor}

    def is_struck(self, ticket: Ticket) -> bool:
        """Say whether it was the deadline of a ticket's call that ended its process."""
        return is_struck(self._log(ticket), ticket.log_bytes)

    def close(self) -> None:
        """End the groups' actors."""
        import ray

        for actor in self._groups.values():
            ray.kill(actor)
        self._groups.clear()

    def cpus(self) -> int:
        """Return how many CPUs the cluster has now; at least one."""
        import ray

        if time.monotonic() - self._looked_s > _LOOK_AT_CLUSTER_EVERY_S:
            self._looked_s = time.monotonic()
            self._cpus = max(int(ray.cluster_resources().get("CPU", 0)), 1)
        return self._cpus

    def _log(self, ticket: Ticket) -> Path:
        return log_path(self._home, self._run_id, ticket.step, ticket.calls[0].item)

    def _run(self, ticket: Ticket, step: Step, job: bytes) -> None:
        calls = pickle.dumps(ticket.calls)
        if ticket.actor is not None:
            ticket.ref = ticket.actor.run.remote(job, calls)
        else:
            ticket.ref = self._task(ticket.step, step).remote(job, calls)
        ticket.ref._on_completed(lambda answer: self._deliver(ticket, answer))

    def _task(self, name: str, step: Step) -> Any:
        if name not in self._tasks:
            options = _options(step) | {"max_retries": 0, "name": f"{self._project}.{name}"}
            self._tasks[name] = _remote_execute().options(**options)
        return self._tasks[name]

    def _group(self, name: str) -> Any:
        import ray

        if name not in self._groups:
            options = self._group_options[name]
            self._groups[name] = ray.remote(Group).options(**options, max_restarts=0).remote()
        return self._groups[name]

    def _effect(self, ticket: Ticket, step: Step) -> Any:
        import ray

        return (
            ray.remote(once.Effect)
            .options(
                **_options(step),
                name=once.actor_name(self._run_id, ticket.step, ticket.calls[0]),
                namespace=once.NAMESPACE,
                lifetime="detached",
                max_restarts=0,
            )
            .remote()
        )


@cache
def _remote_execute() -> Any:
    import ray

    return ray.remote(execute)


def _options(step: Step) -> dict[str, Any]:
    asked = step.resources
    options: dict[str, Any] = {"num_cpus": asked.num_cpus, "num_gpus": asked.num_gpus}
    if asked.memory_bytes is not None:
        options["memory"] = asked.memory_bytes
    if asked.custom:
        options["resources"] = dict(asked.custom)
    if asked.labels:
        options["label_selector"] = dict(asked.labels)
    if step.environment.runtime:
        options["runtime_env"] = dict(step.environment.runtime)
    return options


def _joint_options(steps: Iterable[Step]) -> dict[str, Any]:
    """Return options that are enough for each of the steps: of every amount the greatest."""
    joint: dict[str, Any] = {}
    for step in steps:
        for name, value in _options(step).items():
            if name == "resources":
                known = joint.get(name, {})
                value = known | {k: max(v, known.get(k, 0)) for k, v in value.items()}
            elif isinstance(value, dict):
                value = joint.get(name, {}) | value
            else:
                value = max(value, joint.get(name, 0))
            joint[name] = value
    return joint
