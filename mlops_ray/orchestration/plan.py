"""What a run would do: for each step, whether it is cached, runs, or cannot be known yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mlops_ray.config.check import allowed_packages
from mlops_ray.config.project import Project
from mlops_ray.config.workflow import Step
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.digest import digest_json
from mlops_ray.metadata.ledger import Ledger, RunRecord, StepRecord
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
    done = done_effects(resumes, graph, ledger)
    outputs: dict[str, ArtifactRef] = {}
    planned: list[PlannedStep] = []
    assumed: set[str] = set()
    for name in graph.order:
        item = _plan_step(name, graph, outputs, done, ledger, artifacts, packages_of(project))
        doubts = sorted(graph.needs[name] & assumed)
        if item.state == "cached" and doubts:
            reason = f"same code and config, if {', '.join(doubts)} gives what it gave last"
            item = replace(item, reason=reason)
        if item.state == "run" and item.step.mode != "pure":
            last = intact(ledger.latest(project.name, name), artifacts)
            item = replace(item, output=last)
            doubts = [name]
        if doubts:
            assumed.add(name)
        planned.append(item)
        if item.output is not None:
            outputs[name] = item.output
    return Plan(tuple(planned), resumes)


def done_effects(run: RunRecord | None, graph: Graph, ledger: Ledger) -> dict[str, StepRecord]:
    """Return the effects that an unfinished run has had already, by step."""
    if run is None:
        return {}
    return {
        record.name: record
        for record in ledger.steps(run.run_id)
        if record.status == "succeeded"
        and record.name in graph.order
        and graph.step(record.name).mode == "effect"
    }


def key_in(
    graph: Graph,
    name: str,
    outputs: Mapping[str, ArtifactRef],
    artifacts: ArtifactStore,
    packages: list[str],
) -> str | None:
    """Return the key of a step; None for one that makes a state so, which has none."""
    step = graph.step(name)
    if step.mode == "ensure":
        return None
    ensured = frozenset(other for other in graph.order if graph.step(other).mode == "ensure")
    skip = ensured if step.mode == "effect" else frozenset()
    return key_of(step, outputs, artifacts, packages, ensured=skip)


def intact(record: StepRecord | None, artifacts: ArtifactStore) -> ArtifactRef | None:
    """Return a finished step's output, if its bytes are as they were; a corrupt one is removed."""
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
    done: Mapping[str, StepRecord],
    ledger: Ledger,
    artifacts: ArtifactStore,
    packages: list[str],
) -> PlannedStep:
    step = graph.step(name)
    if step.mode == "ensure":
        return PlannedStep(name, step, "run", "makes a state so: runs every time")
    ensured = {other for other in graph.order if graph.step(other).mode == "ensure"}
    known = set(outputs) | (ensured if step.mode == "effect" else set())
    waiting = sorted(graph.needs[name] - known)
    if waiting:
        return PlannedStep(name, step, "depends", f"depends on {', '.join(waiting)}")
    key = key_in(graph, name, outputs, artifacts, packages)
    assert key is not None
    if step.mode == "effect":
        before = done.get(name)
        output = intact(before, artifacts) if before and before.key == key else None
        if output is not None:
            return PlannedStep(name, step, "finished", "done in that run", key, output)
        return PlannedStep(name, step, "run", "has effects: runs once in each run")
    found = intact(ledger.cached(key), artifacts)
    if found is not None:
        return PlannedStep(name, step, "cached", "same code, config and inputs", key, found)
    return PlannedStep(name, step, "run", "no output with this key yet", key)
