"""Workflows as Ray jobs: submitted once, watched, and found again after a crash."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from typing import Any, Literal, Protocol, Self

from pydantic import Field

from mlops_ray.config.base import Frozen
from mlops_ray.errors import ClusterError, JobRefusedError
from mlops_ray.metadata.changes import SOURCE_VARIABLE
from mlops_ray.metadata.home import STORAGE_VARIABLES

_LOG_TAIL_LINES = 40


class JobCommand(Frozen):
    """What a job runs: ``argv``, the arguments of ``mlops-ray run``.

    ``env`` are environment variables of the job; ``directory`` is where it starts: an absolute path
    on the head node, or the address of a package (``gcs://``).
    """

    argv: tuple[str, ...]
    env: dict[str, str] = Field(default_factory=dict)
    directory: str | None = None

    def with_more(self, *arguments: str, **env: str) -> Self:
        """Return the command with further arguments and variables."""
        return self.model_copy(update={"argv": self.argv + arguments, "env": self.env | env})


class JobOutcome(Frozen):
    """How a job stands. ``lost``: unknown to the cluster. ``log``: the end of a failed one's."""

    status: Literal["running", "succeeded", "failed", "lost"]
    message: str = ""
    log: str = ""


class Jobs(Protocol):
    """Where jobs run."""

    def submit(self, submission_id: str, command: JobCommand) -> None:
        """Start a job; do nothing where one with this id was started already.

        Raises:
            JobRefusedError: The job server refuses; the job was not started.
            ClusterError: The job server cannot be reached.
        """

    def outcomes(self, submission_ids: Iterable[str]) -> dict[str, JobOutcome]:
        """Return how the jobs stand, by their ids."""

    def stop(self, submission_id: str) -> None:
        """Ask a job to end; its outcome says when it has."""


class RayJobs:
    """Jobs of the Ray cluster that this process belongs to."""

    def __init__(self) -> None:
        self._connected: Any = None

    def submit(self, submission_id: str, command: JobCommand) -> None:
        """Submit through Ray's job API.

        Raises:
            JobRefusedError: The API refuses the job, and has not started it.
            ClusterError: The API cannot be reached.
        """
        if self._is_known(submission_id):
            return
        try:
            self._client().submit_job(
                entrypoint=shell_line(command, _address()),
                submission_id=submission_id,
                runtime_env=_runtime_env(command),
                metadata={"mlops_ray": submission_id},
            )
        except OSError as error:
            raise _unreachable(f"job {submission_id} could not be submitted", error) from error
        except Exception as error:
            if not self._is_known(submission_id):
                raise JobRefusedError(
                    f"job {submission_id} is refused by the job server",
                    why=f"{type(error).__name__}: {error}",
                ) from error

    def outcomes(self, submission_ids: Iterable[str]) -> dict[str, JobOutcome]:
        """Ask Ray's job API.

        Raises:
            ClusterError: The API cannot be reached.
        """
        wanted = list(submission_ids)
        try:
            # Asking for the status of an unknown job raises, and other faults raise the same way;
            # the list tells them apart.
            known = {job.submission_id: job for job in self._client().list_jobs()}
            return {name: self._outcome(name, known.get(name)) for name in wanted}
        except Exception as error:
            what = f"the state of job {', '.join(wanted)} is unknown"
            raise _unreachable(what, error) from error

    def stop(self, submission_id: str) -> None:
        """Ask through Ray's job API; a job that ignores it is killed by Ray after seconds.

        Raises:
            ClusterError: The API cannot be reached.
        """
        if self.outcomes([submission_id])[submission_id].status != "running":
            return
        try:
            self._client().stop_job(submission_id)
        except Exception as error:
            raise _unreachable(f"job {submission_id} could not be stopped", error) from error

    def _is_known(self, submission_id: str) -> bool:
        return self.outcomes([submission_id])[submission_id].status != "lost"

    def _outcome(self, submission_id: str, job: Any) -> JobOutcome:
        if job is None:
            return JobOutcome(status="lost")
        status, message = str(job.status.value), job.message or ""
        if status in ("PENDING", "RUNNING"):
            return JobOutcome(status="running", message=message)
        if status == "SUCCEEDED":
            return JobOutcome(status="succeeded")
        log = self._log_tail(submission_id)
        return JobOutcome(status="failed", message=message or status.lower(), log=log)

    def _log_tail(self, submission_id: str) -> str:
        lines = self._client().get_job_logs(submission_id).splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _client(self) -> Any:
        if self._connected is None:
            from ray.job_submission import JobSubmissionClient

            self._connected = JobSubmissionClient(_address())
        return self._connected


def told_environment() -> dict[str, str]:
    """Return the variables of this process that a job of the same project must be told."""
    names = (SOURCE_VARIABLE, *STORAGE_VARIABLES.values())
    return {name: os.environ[name] for name in names if name in os.environ}


def shipped_directory() -> str | None:
    """Return the package that this job was shipped with, None where it was started in place."""
    import ray

    shipped = ray.get_runtime_context().runtime_env.get("working_dir")
    return str(shipped) if shipped and "://" in str(shipped) else None


def shell_line(command: JobCommand, address: str = "") -> str:
    """Return a job's entry point: the command, quoted for a shell.

    ``address`` is the cluster's: with two clusters on one host, Ray may tell the job the other's.
    """
    joined = [f"cluster.address={address}"] if address else []
    line = shlex.join([*command.argv, *joined])
    if command.directory and "://" not in command.directory:
        return f"cd {shlex.quote(command.directory)} && exec {line}"
    return line


def _address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _runtime_env(command: JobCommand) -> dict[str, Any]:
    environment: dict[str, Any] = {"env_vars": dict(command.env)}
    if command.directory and "://" in command.directory:
        environment["working_dir"] = command.directory
    return environment


def _unreachable(what: str, error: Exception) -> ClusterError:
    return ClusterError(
        what,
        why=f"{type(error).__name__}: {error}",
        fix="check that the cluster's dashboard runs: `mlops-ray doctor`",
    )
