"""Submitting a workflow through Ray's job API."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mlops_ray.cluster.connect import prepare_environment
from mlops_ray.config.locate import default_home
from mlops_ray.errors import ClusterError
from mlops_ray.metadata.changes import shipped
from mlops_ray.metadata.home import STORAGE_VARIABLES
from mlops_ray.metadata.redaction import redacted

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_EXCLUDES = (".git", ".venv", ".mlops-ray*", "**/__pycache__", "outputs", "multirun")


def submit(
    overrides: list[str],
    *,
    address: str | None,
    directory: Path,
    echo: Callable[[str], None] | None = None,
    job_id: str | None = None,
) -> tuple[str, str]:
    """Submit ``mlops-ray run OVERRIDES`` as a Ray job, with ``directory`` packaged.

    Args:
        overrides: Hydra overrides.
        address: The dashboard's address; None takes ``$RAY_API_SERVER_ADDRESS`` or this machine's.
        directory: The working directory to ship. What git ignores stays behind.
        echo: Called with each piece of the job's output; None returns at once.
        job_id: A name for the job; submitting the same name twice is refused by Ray.

    Returns:
        The job's id and its status: ``PENDING`` without ``echo``, else its final status.

    Raises:
        ClusterError: The job server cannot be reached or refuses.
    """
    prepare_environment()
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    client = _client(address)
    local = urlparse(address).hostname in ("127.0.0.1", "localhost", "::1")
    try:
        with shipped(directory) as source:
            submitted = client.submit_job(
                entrypoint=shlex.join(
                    [sys.executable if local else "python", *_command(overrides)]
                ),
                runtime_env=_runtime_environment(directory, local, source),
                submission_id=job_id,
            )
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise _refused(address, error) from error
    if echo is None:
        return submitted, "PENDING"
    asyncio.run(_follow(client, submitted, echo))
    return submitted, str(client.get_job_status(submitted).value)


def _command(overrides: list[str]) -> list[str]:
    return ["-m", "mlops_ray", "run", *overrides]


def _runtime_environment(directory: Path, local: bool, source: dict[str, str]) -> dict[str, Any]:
    variables = {"PYTHONUNBUFFERED": "1"} | source
    variables |= {k: os.environ[k] for k in STORAGE_VARIABLES.values() if k in os.environ}
    if local:
        variables["MLOPS_RAY_HOME"] = str(default_home())
    return {"working_dir": str(directory), "excludes": list(_EXCLUDES), "env_vars": variables}


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise _refused(address, error) from error


async def _follow(client: Any, job_id: str, echo: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job_id):
        echo(text)


def _refused(address: str, error: Exception) -> ClusterError:
    text = str(error).strip()
    return ClusterError(
        "the Ray job server cannot be reached, or refuses the job",
        where=redacted(address),
        why=redacted(text.splitlines()[0], address) if text else type(error).__name__,
        fix="start one with `ray start --head`, or give --address; `mlops-ray doctor` checks "
        "the token and the ports",
    )
