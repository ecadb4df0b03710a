"""Retrainings as Ray jobs: submitted once, watched, and found again after a crash."""

from __future__ import annotations

import shlex
from typing import Any, Literal, Protocol

from pydantic import Field

from mlops_ray.config.base import Frozen
from mlops_ray.errors import ClusterError

_LOG_TAIL_LINES = 40


class RetrainCommand(Frozen):
    """What a retraining runs: ``argv`` and then ``until=<moment>``, the bound on what it may see.

    ``env`` are environment variables of the job; ``directory`` is where it starts: an absolute path
    on the head node, or the address of a package (``gcs://``).
    """

    argv: tuple[str, ...]
    env: dict[str, str] = Field(default_factory=dict)
    directory: str | None = None


class JobOutcome(Frozen):
    """How a job stands. ``lost``: unknown to the cluster. ``log``: the end of a failed one's."""

    status: Literal["running", "succeeded", "failed", "lost"]
    message: str = ""
    log: str = ""


class Jobs(Protocol):
    """Where retrainings run."""

    def submit(self, submission_id: str, command: RetrainCommand, until: str) -> None:
        """Start a job; do nothing where one with this id was started already."""

    def outcome(self, submission_id: str) -> JobOutcome:
        """Return how the job stands."""


class RayJobs:
    """Jobs of the Ray cluster that this process belongs to."""

    def __init__(self) -> None:
        self._connected: Any = None

    def submit(self, submission_id: str, command: RetrainCommand, until: str) -> None:
        """Submit through Ray's job API.

        Raises:
            ClusterError: The API cannot be reached or refuses the job.
        """
        if self.outcome(submission_id).status != "lost":
            return
        try:
            self._client().submit_job(
                entrypoint=shell_line(command, until, _address()),
                submission_id=submission_id,
                runtime_env=_runtime_env(command),
                metadata={"mlops_ray": "retraining", "until": until},
            )
        except Exception as error:
            raise _unreachable(
                f"retraining {submission_id} could not be submitted", error
            ) from error

    def outcome(self, submission_id: str) -> JobOutcome:
        """Ask Ray's job API.

        Raises:
            ClusterError: The API cannot be reached.
        """
        try:
            # Asking for the status of an unknown job raises, and other faults raise the same way;
            # the list tells them apart.
            known = {job.submission_id: job for job in self._client().list_jobs()}
            if submission_id not in known:
                return JobOutcome(status="lost")
            status = str(known[submission_id].status.value)
            message = known[submission_id].message or ""
            log = self._log_tail(submission_id) if status in ("FAILED", "STOPPED") else ""
        except Exception as error:
            raise _unreachable(f"the state of job {submission_id} is unknown", error) from error
        if status in ("PENDING", "RUNNING"):
            return JobOutcome(status="running", message=message)
        if status == "SUCCEEDED":
            return JobOutcome(status="succeeded")
        return JobOutcome(status="failed", message=message or status.lower(), log=log)

    def _log_tail(self, submission_id: str) -> str:
        lines = self._client().get_job_logs(submission_id).splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _client(self) -> Any:
        if self._connected is None:
            import ray
            from ray.job_submission import JobSubmissionClient

            self._connected = JobSubmissionClient(ray.get_runtime_context().gcs_address)
        return self._connected


def shell_line(command: RetrainCommand, until: str, address: str = "") -> str:
    """Return the job's entry point: the command with its bound, quoted for a shell.

    ``address`` is the cluster's: with two clusters on one host, Ray may tell the job the other's.
    """
    joined = [f"cluster.address={address}"] if address else []
    line = shlex.join([*command.argv, f"until={until}", *joined])
    if command.directory and "://" not in command.directory:
        return f"cd {shlex.quote(command.directory)} && exec {line}"
    return line


def _address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _runtime_env(command: RetrainCommand) -> dict[str, Any]:
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
