"""Running a workflow: each step one Ray task, every change a row in the ledger."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlops_ray.config.project import Project
from mlops_ray.errors import MlopsRayError, StepError, WorkflowError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.ledger import Ledger, RunRecord, RunStatus, StepRecord, now
from mlops_ray.metadata.provenance import collect
from mlops_ray.orchestration import references
from mlops_ray.orchestration.graph import Graph, build
from mlops_ray.orchestration.plan import (
    config_digest,
    done_effects,
    intact,
    key_in,
    packages_of,
    unfinished_run,
)
from mlops_ray.orchestration.resolution import arguments_of, resolve
from mlops_ray.orchestration.worker import Task, execute

Listener = Callable[[RunRecord, list[StepRecord]], None]
_POLL_S = 0.25
_CANCEL_GRACE_S = 8.0


@dataclass
class _Attempt:
    """One attempt at one step: the running Ray task and when it began."""

    future: Any
    began_s: float
    tries: int = 1


@dataclass
class _State:
    """Where a run stands. ``done`` are the effects of an earlier attempt; ``over`` also counts skips."""

    outputs: dict[str, ArtifactRef] = field(default_factory=dict)
    done: dict[str, StepRecord] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    running: dict[str, _Attempt] = field(default_factory=dict)

    def over(self, name: str) -> bool:
        return name in self.outputs or name in self.skipped


class Executor:
    """Runs a project's workflow on the Ray that this process is connected to.

    Args:
        project: What to run.
        directory: The working directory; provenance looks for git and the lock file there.
        roots: Folders that hold the project's code.
        command: How to run a workflow of this project again, see ``Context``.
        listener: Called about four times a second with the run and its steps.
    """

    def __init__(
        self,
        project: Project,
        *,
        directory: Path,
        roots: tuple[str, ...] = (),
        command: tuple[str, ...] = (),
        listener: Listener | None = None,
    ) -> None:
        self._project = project
        self._directory = directory
        self._roots = roots
        self._command = command
        self._listener = listener
        self._home = Home(project.home)
        self._graph: Graph = build(project.workflow)
        self._ledger = Ledger(self._home.ledger_url)
        self._artifacts = ArtifactStore(self._home.artifacts)
        self._packages = packages_of(project)

    def run(self, *, fresh: bool = False) -> RunRecord:
        """Run to the end, taking up an unfinished run of the same workflow and configuration.

        Its effects are not repeated while their code and inputs are the same; what is pure comes
        from the cache. ``fresh`` starts a new run in any case.

        Raises:
            StepError: A step failed. What was finished stays; the same call goes on from there.
            WorkflowError: Another process is running this very run.
        """
        run, state = self._start() if fresh else self._begin()
        try:
            self._drive(run.run_id, state)
        except BaseException as error:
            status: RunStatus = "failed" if isinstance(error, Exception) else "interrupted"
            with contextlib.suppress(KeyboardInterrupt):
                self._stop(run.run_id, state)
            self._ledger.finish_run(run.run_id, status)
            self._event(run.run_id, f"run_{status}", reason=str(error))
            self._notify(run.run_id)
            raise
        self._ledger.finish_run(run.run_id, "succeeded")
        self._event(run.run_id, "run_succeeded")
        self._notify(run.run_id)
        return self._record(run.run_id)

    def output(self, run_id: str, step: str) -> Any:
        """Return the output of a finished step of a run."""
        for record in self._ledger.steps(run_id):
            if record.name == step and record.output is not None:
                return self._artifacts.get(record.output)
        raise WorkflowError(f"step {step!r} of run {run_id} has no output")

    def steps(self, run_id: str) -> list[StepRecord]:
        """Return the steps of a run."""
        return self._ledger.steps(run_id)

    def _begin(self) -> tuple[RunRecord, _State]:
        previous = unfinished_run(self._project, self._ledger)
        if previous is None:
            return self._start()
        if previous.status == "running" and _is_alive(previous.owner):
            raise WorkflowError(
                f"run {previous.run_id} of this workflow is running already",
                where=previous.owner,
                fix="wait for it, follow it with `mlops-ray status`, or begin anew with --fresh",
            )
        done = done_effects(previous, self._graph, self._ledger)
        if not self._ledger.take_run(previous, _owner(), self._provenance()):
            raise WorkflowError(f"run {previous.run_id} was just taken up by another process")
        for step in self._ledger.steps(previous.run_id):
            if step.status not in ("succeeded", "cached"):
                self._ledger.update_step(previous.run_id, step.name, status="pending", message=None)
        self._event(previous.run_id, "run_resumed", effects=sorted(done))
        return self._record(previous.run_id), _State(done=done)

    def _provenance(self) -> dict[str, Any]:
        return collect(self._directory, config_digest(self._project), self._project.seed)

    def _start(self) -> tuple[RunRecord, _State]:
        digest = config_digest(self._project)
        record = RunRecord(
            run_id=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
            project=self._project.name,
            workflow=self._project.workflow.name,
            status="running",
            config_digest=digest,
            started_at=datetime.now(UTC),
            ended_at=None,
            owner=_owner(),
            config=self._project.model_dump(mode="json", by_alias=True),
            provenance=self._provenance(),
        )
        self._ledger.start_run(record, list(self._graph.order))
        self._event(record.run_id, "run_started")
        return record, _State()

    def _drive(self, run_id: str, state: _State) -> None:
        notified_s = 0.0
        while not all(state.over(name) for name in self._graph.order):
            for name in self._ready(state):
                self._begin_step(run_id, name, state)
            self._collect(run_id, state)
            if time.monotonic() - notified_s > _POLL_S:
                notified_s = time.monotonic()
                self._notify(run_id)

    def _ready(self, state: _State) -> Iterator[str]:
        for name in self._graph.order:
            waits = state.over(name) or name in state.running
            if not waits and all(state.over(other) for other in self._graph.after[name]):
                yield name

    def _begin_step(self, run_id: str, name: str, state: _State) -> None:
        reason = self._reason_to_skip(name, state)
        if reason is not None:
            state.skipped[name] = reason
            self._set(run_id, name, "skipped", message=reason, ended_at=now())
            return
        key = key_in(self._graph, name, state.outputs, self._artifacts, self._packages)
        if self._is_done(run_id, name, key, state):
            return
        self._set(run_id, name, "running", key=key, started_at=now(), ended_at=None)
        state.running[name] = _Attempt(self._submit(run_id, name, state), time.monotonic())

    def _is_done(self, run_id: str, name: str, key: str | None, state: _State) -> bool:
        """Take a step's output from the cache, or an effect's from this run's earlier attempt."""
        mode = self._graph.step(name).mode
        if key is None:
            return False
        record = self._ledger.cached(key) if mode == "pure" else state.done.get(name)
        if record is None or record.key != key:
            return False
        output = intact(record, self._artifacts)
        if output is None:
            return False
        state.outputs[name] = output
        if mode == "pure":
            kept = {"rows": record.rows, "metrics": record.metrics, "params": record.params}
            moment = {"started_at": None, "ended_at": now()}
            self._set(run_id, name, "cached", key=key, output=output, **kept, **moment)
        return True

    def _reason_to_skip(self, name: str, state: _State) -> str | None:
        for other in sorted(self._graph.needs[name]):
            if other in state.skipped:
                return f"needs {other}, which was skipped"
        condition = references.parse(self._graph.step(name).when)
        if condition is None:
            return None
        value = resolve(condition, state.outputs, self._artifacts).value
        return None if value else f"{condition} is {str(value).lower()}"

    def _submit(self, run_id: str, name: str, state: _State) -> Any:
        import ray

        step = self._graph.step(name)
        task = Task(
            project=self._project.name,
            home=self._home.root,
            run_id=run_id,
            step=name,
            target=step.uses,
            arguments=arguments_of(step, state.outputs, self._artifacts),
            roots=self._roots,
            command=self._command,
            packages=tuple(self._packages),
        )
        options: dict[str, Any] = {
            "num_cpus": step.resources.num_cpus,
            "num_gpus": step.resources.num_gpus,
            "max_retries": 0,
            "name": f"{self._project.name}.{name}",
        }
        if step.resources.memory_bytes is not None:
            options["memory"] = step.resources.memory_bytes
        return ray.remote(execute).options(**options).remote(task)

    def _collect(self, run_id: str, state: _State) -> None:
        import ray

        if not state.running:
            return
        futures = [attempt.future for attempt in state.running.values()]
        done, _ = ray.wait(futures, num_returns=1, timeout=_POLL_S)
        for name, attempt in list(state.running.items()):
            if attempt.future in done:
                self._finish_step(run_id, name, attempt, state)
            else:
                self._check_timeout(run_id, name, attempt)

    def _finish_step(self, run_id: str, name: str, attempt: _Attempt, state: _State) -> None:
        import ray

        try:
            output = ray.get(attempt.future)
        except Exception as error:
            failure = _as_step_error(error, name, run_id)
            if attempt.tries <= self._graph.step(name).retries:
                self._event(run_id, "step_retried", step=name, reason=failure.what)
                future = self._submit(run_id, name, state)
                state.running[name] = _Attempt(future, time.monotonic(), attempt.tries + 1)
                return
            del state.running[name]
            self._set(run_id, name, "failed", message=failure.what, ended_at=now())
            raise failure from None
        del state.running[name]
        state.outputs[name] = output
        rows = {"rows": output.rows} if output.rows is not None else {}
        self._set(run_id, name, "succeeded", output=output, ended_at=now(), **rows)

    def _check_timeout(self, run_id: str, name: str, attempt: _Attempt) -> None:
        limit = self._graph.step(name).timeout
        if limit is not None and time.monotonic() - attempt.began_s > limit.total_seconds():
            raise StepError(
                f"the step took longer than its timeout of {limit}", step=name, run_id=run_id
            )

    def _stop(self, run_id: str, state: _State) -> None:
        """Cancel what is running, give it a moment to end, and record it as pending again."""
        import ray

        futures = [attempt.future for attempt in state.running.values()]
        if futures and ray.is_initialized():
            for future in futures:
                ray.cancel(future, force=False)
            ray.wait(futures, num_returns=len(futures), timeout=_CANCEL_GRACE_S)
        for name in state.running:
            self._set(run_id, name, "pending", message="interrupted")

    def _set(self, run_id: str, name: str, status: str, **values: Any) -> None:
        self._ledger.update_step(run_id, name, status=status, **values)
        reason = values.get("message")
        self._event(run_id, f"step_{status}", step=name, **({"reason": reason} if reason else {}))

    def _event(self, run_id: str, kind: str, step: str | None = None, **data: Any) -> None:
        self._ledger.append(self._project.name, kind, data, run_id=run_id, step=step)

    def _notify(self, run_id: str) -> None:
        if self._listener is not None:
            self._listener(self._record(run_id), self._ledger.steps(run_id))

    def _record(self, run_id: str) -> RunRecord:
        record = self._ledger.run(run_id)
        assert record is not None
        return record


def _as_step_error(error: Exception, step: str, run_id: str) -> StepError:
    # Ray raises a mixture of its own error and the step's; only the cause reads as the step's.
    cause = getattr(error, "cause", None)
    if isinstance(cause, StepError):
        return cause
    if isinstance(error, MlopsRayError):
        return StepError(str(error), step=step, run_id=run_id)
    headline = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return StepError(f"{type(error).__name__}: {headline}", step=step, run_id=run_id)


def _owner() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{_process_start(os.getpid())}"


def _is_alive(owner: str) -> bool:
    """Say whether the owner of a run lives. One on another host counts as alive."""
    host, pid, started = (*owner.rsplit(":", 2),)
    if host != socket.gethostname():
        return True
    return _process_start(int(pid)) == started != ""


def _process_start(pid: int) -> str:
    """Return when a process began, in clock ticks since boot; "" when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
