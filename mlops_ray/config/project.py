"""The root of the configuration: one frozen ``Project``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.config.batch import BatchPredict
from mlops_ray.config.features import Features
from mlops_ray.config.monitoring import Loop, Monitoring, Replay
from mlops_ray.config.serving import Serving
from mlops_ray.config.training import Evaluation, Gate, Model, Training, Tuning
from mlops_ray.config.triggers import Trigger, Webhook
from mlops_ray.config.workflow import Workflow


class Cluster(Frozen):
    """Which Ray to use: ``address`` local starts one here, auto or host:port joins one; None joins
    ``$RAY_ADDRESS`` where that is set (as it is inside a Ray job) and else starts one here.

    ``num_cpus`` (local only) are logical CPUs; None takes the machine's, but at least eight, since
    the endpoint, the pipeline and two training workers each hold one while they mostly wait.
    """

    address: str | None = None
    num_cpus: int | None = Field(default=None, ge=1)
    object_store_bytes: int | None = Field(default=None, ge=80_000_000)
    dashboard_port: int = Field(default=8265, ge=1, le=65535)


class Project(Frozen):
    """A whole project, composed and checked.

    ``package`` is the project's own Python package, ``allow`` names further packages that
    ``_target_``, ``uses``, ``read`` and the like may point into. ``until`` is the moment up to which
    a run may see data (None: no bound).
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    description: str = ""
    problem: Literal["binary_classification"] = "binary_classification"
    package: str | None = None
    allow: tuple[str, ...] = ()
    home: Path
    seed: int = 0
    until: Instant | None = None
    cluster: Cluster = Cluster()
    features: Features
    model: Model
    training: Training
    tuning: Tuning = Tuning()
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()
    serving: Serving = Serving()
    monitoring: Monitoring
    loop: Loop
    replay: Replay | None = None
    batch: BatchPredict | None = None
    workflow: Workflow
    triggers: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Trigger] = Field(
        default_factory=dict
    )
    webhook: Webhook = Webhook()
