"""What a run would do: for each step, whether it is cached, runs, or cannot be known yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlops_ray.config.check import allowed_packages
from mlops_ray.config.project import Project
from mlops_ray.config.workflow import Step
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.ledger import Ledger, RunRecord
from mlops_ray.orchestration.graph import Graph
from mlops_ray.orchestration.resolution import key_of

PlannedState = Literal["cached", "finished", "run", "depends"]


@dataclass(frozen=True)
class PlannedStep:
    """What would happen to one step, and why.

    *cached*: an output with the same key exists. *finished*: done already in the run that would be
    resumed. *run*: it would run. *depends*: only known once the steps before it have run.
    """

    name: str
    step: Step
    state: PlannedState
    reason: str
    key: str | None = None
    output: ArtifactRef | None = None


@dataclass(frozen=True)
class Plan:
    """The steps in order, and the unfinished run that would be resumed, if any."""

    steps: tuple[PlannedStep, ...]
    resumes: RunRecord | None


def packages_of(project: Project) -> list[str]:
    """Return the packages whose code counts for cache keys."""
    return allowed_packages({"package": project.package, "allow": list(project.allow)})


def config_digest(project: Project) -> str:
    """Digest everything that decides results: all but where state is kept and which Ray is used."""
    return digest_json(project.model_dump(mode="json", by_alias=True, exclude={"home", "cluster"}))


def unfinished_run(project: Project, ledger: Ledger) -> RunRecord | None:
    """Return the newest run of this workflow and configuration if it did not succeed."""
    digest = config_digest(project)
    for record in ledger.runs(project=project.name, workflow=project.workflow.name, limit=50):
        if record.config_digest == digest:
            return None if record.status == "succeeded" else record
    return None


def make_plan(project: Project, graph: Graph, ledger: Ledger, artifacts: ArtifactStore) -> Plan:
    """Find out what a run would do, without running anything."""
    resumes = unfinished_run(project, ledger)
    outputs = finished_outputs(resumes, ledger, artifacts)
    planned: list[PlannedStep] = []
    for name in graph.order:
        item = _plan_step(name, graph, outputs, ledger, artifacts, packages_of(project))
        planned.append(item)
        if item.output is not None:
            outputs[name] = item.output
    return Plan(tuple(planned), resumes)


def finished_outputs(
    run: RunRecord | None, ledger: Ledger, artifacts: ArtifactStore
) -> dict[str, ArtifactRef]:
    """Return the outputs of the steps that a run has finished and whose artifacts are intact."""
    if run is None:
        return {}
    return {
        record.name: record.output
        for record in ledger.steps(run.run_id)
        if record.status in ("succeeded", "cached")
        and record.output is not None
        and artifacts.verify(record.output)
    }


def cached_output(key: str, ledger: Ledger, artifacts: ArtifactStore) -> ArtifactRef | None:
    """Return the output kept under a key, if its bytes are intact; a corrupt one is removed."""
    record = ledger.cached(key)
    if record is None or record.output is None:
        return None
    if artifacts.verify(record.output):
        return record.output
    artifacts.discard(record.output.digest)
    return None


def _plan_step(
    name: str,
    graph: Graph,
    outputs: dict[str, ArtifactRef],
    ledger: Ledger,
    artifacts: ArtifactStore,
    packages: list[str],
) -> PlannedStep:
    step = graph.step(name)
    if step.mode == "ensure":
        return PlannedStep(name, step, "run", "makes a state so: runs every time")
    if name in outputs:
        return PlannedStep(
            name, step, "finished", "done in the interrupted run", output=outputs[name]
        )
    waiting = sorted(other for other in graph.needs[name] if other not in outputs)
    if waiting:
        return PlannedStep(name, step, "depends", f"depends on {', '.join(waiting)}")
    if step.mode == "effect":
        return PlannedStep(name, step, "run", "has effects: runs once in each run")
    key = key_of(step, outputs, artifacts, packages)
    found = cached_output(key, ledger, artifacts)
    if found is not None:
        return PlannedStep(name, step, "cached", "same code, config and inputs", key, found)
    return PlannedStep(name, step, "run", "no output with this key yet", key)
