"""What Ray's job API answers, as those who submit see it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import requests

from mlops_ray.errors import ClusterError, JobRefusedError
from mlops_ray.orchestration import jobs
from mlops_ray.orchestration.jobs import JobCommand, RayJobs


class Client:
    """A job server that fails; it may have taken the job nevertheless."""

    def __init__(self, error: Exception, *, takes: bool = False) -> None:
        self.error = error
        self.takes = takes
        self.known: list[Any] = []

    def list_jobs(self) -> list[Any]:
        return self.known

    def submit_job(self, submission_id: str, **_: Any) -> None:
        if self.takes:
            status = SimpleNamespace(value="RUNNING")
            self.known = [SimpleNamespace(submission_id=submission_id, status=status, message="")]
        raise self.error


def submit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_address", lambda: "head:6379")
    made = RayJobs()
    made._connected = client
    made.submit("job-1", JobCommand(argv=("true",)))


def test_a_refusal_is_told_from_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobRefusedError, match="status code 400"):
        submit(Client(RuntimeError("Request failed with status code 400")), monkeypatch)
    for away in (requests.ConnectionError("refused"), ConnectionError("no dashboard")):
        with pytest.raises(ClusterError) as caught:
            submit(Client(away), monkeypatch)
        assert not isinstance(caught.value, JobRefusedError)


def test_a_job_that_was_taken_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    submit(Client(RuntimeError("the answer was lost"), takes=True), monkeypatch)
