"""A driver in a process of its own, to be killed: joins the Ray at ``RAY_ADDRESS``, runs one workflow.

Usage: ``python -m orchestration.driver HOME STEPS_JSON``. Prints the run's outcome as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray

from mlops_ray.config.workflow import Workflow
from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.executor import Executor
from mlops_ray.orchestration.spec import RunSpec


def spec_of(home: Path, steps: dict[str, Any]) -> RunSpec:
    """Return the spec that every driver of these steps has, in whatever process."""
    return RunSpec(
        project="bench",
        workflow=Workflow.model_validate({"name": "driven", "steps": steps}),
        home=Home(home),
        config_digest="0" * 64,
        packages=("orchestration",),
        directory=home,
    )


def main(home: str, steps: str) -> None:
    path = os.environ["PYTHONPATH"]
    ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        run = Executor(spec_of(Path(home), json.loads(steps))).run()
        print(json.dumps({"run": run.run_id, "status": run.status}))
    except MlopsRayError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
