"""Running a part of a workflow from recorded facts: what the code of then is asked, and answers.

The request and the answer are files, read and written by two versions of this package: what they
hold may be added to, and must not change its meaning.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from mlops_ray.config.base import Frozen
from mlops_ray.config.check import allowed_packages
from mlops_ray.config.project import Cluster
from mlops_ray.config.workflow import Workflow
from mlops_ray.errors import StepError
from mlops_ray.metadata.access import dismiss_writer, open_ledger
from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.files import write_whole
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.spec import RunSpec


class Request(Frozen):
    """What to run.

    Args:
        home: A home of its own, whose store holds the given outputs.
        config: The whole configuration of the run to repeat.
        given: Outputs that are facts, by step.
        only: The steps whose outputs are wanted.
        reason: Why.
    """

    home: Path
    config: dict[str, Any]
    given: dict[str, ArtifactRef]
    only: tuple[str, ...]
    reason: str = "reproduction"

    @property
    def cluster(self) -> Cluster:
        """Which Ray to use: what the environment says, since the cluster of then may be gone."""
        told = Cluster.model_validate(self.config.get("cluster", {}))
        return told.model_copy(update={"address": None})

    def spec(self, directory: Path, roots: tuple[str, ...]) -> RunSpec:
        """Return what the executor needs."""
        allowed = {"package": self.config.get("package"), "allow": self.config.get("allow", [])}
        decides = {k: v for k, v in self.config.items() if k not in ("home", "cluster")}
        return RunSpec(
            project=str(self.config["name"]),
            workflow=Workflow.model_validate(self.config["workflow"]),
            home=Home(self.home),
            config=self.config,
            config_digest=digest_json(decides),
            seed=int(self.config.get("seed", 0)),
            packages=tuple(allowed_packages(allowed)),
            directory=directory,
            roots=roots,
            reason=self.reason,
            given=self.given,
            only=frozenset(self.only),
        )


class Result(Frozen):
    """What became of one step. ``code`` holds the digest of each definition that it reached."""

    status: str
    output: ArtifactRef | None = None
    seconds: float = 0.0
    error: str | None = None
    code: dict[str, str] = Field(default_factory=dict)


class Answer(Frozen):
    """What became of the run: its steps in their order. ``error`` says why it failed, if it did.

    ``run_id`` is empty where no run began.
    """

    run_id: str
    succeeded: bool
    error: str = ""
    steps: dict[str, Result] = Field(default_factory=dict)


def read_request(path: Path) -> Request:
    """Read a request."""
    return Request.model_validate_json(path.read_bytes())


def rerun(request: Request, answer: Path, run: Callable[[Request], None]) -> Answer:
    """Run what a request asks for, and write the answer to a file, whatever becomes of it.

    Args:
        request: What to run.
        answer: The file to write.
        run: Runs a request; raises where it cannot, or where a step fails.
    """
    error = ""
    try:
        run(request)
    except StepError as failure:
        error = str(failure)
    except Exception as failure:
        # Nobody expects it, so its place in the code may be needed.
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    found = _answer(Home(request.home), error)
    write_whole(answer, found.model_dump_json(indent=1).encode())
    return found


def _answer(home: Home, error: str) -> Answer:
    ledger = open_ledger(home)
    try:
        runs = ledger.runs(limit=1)
        if not runs:
            return Answer(run_id="", succeeded=False, error=error)
        record, steps = runs[0], {}
        for step in ledger.steps(record.run_id):
            parts = (ledger.key_parts(step.key) if step.key else None) or {}
            began, ended = step.started_at, step.ended_at
            steps[step.name] = Result(
                status=step.status,
                output=step.output,
                seconds=(ended - began).total_seconds() if began and ended else 0.0,
                error=step.error or (step.message if step.status == "failed" else None),
                code=parts.get("code", {}),
            )
    finally:
        ledger.close()
        dismiss_writer(home)
    return Answer(
        run_id=record.run_id, succeeded=record.status == "succeeded", error=error, steps=steps
    )


def environment_of(request: Path, folder: Path, roots: tuple[str, ...]) -> dict[str, str]:
    """Return the environment of the process that runs a request with the code in ``folder``.

    Servers that hold the present state are out of its sight, and so is the repository around it.
    """
    hidden = ("MLOPS_RAY_LEDGER", "MLOPS_RAY_ARTIFACTS", "MLOPS_RAY_TRACKING", "MLOPS_RAY_SOURCE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    paths = [str(folder), *roots, *kept.get("PYTHONPATH", "").split(os.pathsep)]
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        "MLOPS_RAY_HOME": str(read_request(request).home),
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
