"""What a run would do: for each step, whether it is cached, runs, or cannot be known yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mlops_ray.config.workflow import Step
from mlops_ray.errors import WorkflowError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import RunRecord, StepRecord
from mlops_ray.orchestration.graph import Graph
from mlops_ray.orchestration.keys import StepKey, item_key
from mlops_ray.orchestration.once import SAID_DONE
from mlops_ray.orchestration.resolution import element_digest, elements_of, key_of, refusal
from mlops_ray.orchestration.reuse import DONE
from mlops_ray.orchestration.spec import RunSpec

PlannedState = Literal["cached", "finished", "run", "skipped", "depends", "uncertain"]


@dataclass(frozen=True)
class PlannedStep:
    """What would happen to one step, and why.

    *cached*: an output with the same key exists and its bytes are right. *finished*: done already in
    the run that would be resumed. *run*: it would run. *skipped*: a condition does not hold.
    *depends*: only known once the steps before it have run. *uncertain*: an effect of the run that
    would be resumed may or may not have happened; a person must say. Of a mapped step ``calls`` says
    how many of how many are cached, if known.
    """

    name: str
    step: Step
    state: PlannedState
    reason: str
    key: StepKey | None = None
    output: ArtifactRef | None = None
    calls: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """The steps in order, and the unfinished run that would be resumed, if any."""

    steps: tuple[PlannedStep, ...]
    resumes: RunRecord | None


def make_plan(spec: RunSpec, graph: Graph, ledger: Ledger, artifacts: ArtifactStore) -> Plan:
    """Find out what a run would do, without running or changing anything."""
    resumes = unfinished_run(spec, ledger)
    planner = _Planner(spec, graph, ledger, artifacts, *_before(resumes, graph, ledger))
    return Plan(tuple(planner.plan(name) for name in graph.order), resumes)


def unfinished_run(spec: RunSpec, ledger: Ledger) -> RunRecord | None:
    """Return the newest run of this workflow and configuration if it did not succeed."""
    found = ledger.runs(
        project=spec.project,
        workflow=spec.workflow.name,
        config_digest=spec.instance_digest,
        limit=1,
    )
    return found[0] if found and found[0].status != "succeeded" else None


def key_in(
    graph: Graph,
    name: str,
    outputs: Mapping[str, ArtifactRef],
    artifacts: ArtifactStore,
    packages: tuple[str, ...],
) -> StepKey:
    """Return the key of a step whose inputs are known. To an effect the outputs of ``ensure`` steps
    count by name alone; the key of such a step itself serves no cache, only ``why``."""
    step = graph.step(name)
    skip = frozenset() if step.mode == "pure" else ensured(graph)
    return key_of(step, outputs, artifacts, packages, ensured=skip)


def ensured(graph: Graph) -> frozenset[str]:
    """Return the steps that make a state so."""
    return frozenset(name for name in graph.order if graph.step(name).mode == "ensure")


def _before(
    run: RunRecord | None, graph: Graph, ledger: Ledger
) -> tuple[dict[str, StepRecord], frozenset[str]]:
    """Return the steps that a run has done, and the effects of which nobody knows."""
    records = [] if run is None else ledger.steps(run.run_id)
    known = [record for record in records if record.name in graph.flat]
    done = {record.name: record for record in known if record.status in DONE}
    return done, frozenset(r.name for r in known if r.status == "uncertain")


@dataclass
class _Planner:
    """Goes through the steps in order. ``assumed`` are steps that will run and are taken to give
    what they gave last."""

    spec: RunSpec
    graph: Graph
    ledger: Ledger
    artifacts: ArtifactStore
    done: Mapping[str, StepRecord]
    uncertain: frozenset[str]
    outputs: dict[str, ArtifactRef] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    assumed: set[str] = field(default_factory=set)

    def plan(self, name: str) -> PlannedStep:
        """Say what would happen to a step, the steps before it having been planned."""
        item = self._planned(name)
        doubts = sorted(self.graph.needs[name] & self.assumed)
        if item.state in ("cached", "skipped") and doubts:
            item = replace(item, reason=f"{item.reason}, if {_repeats(doubts)}")
        if item.state == "run" and item.step.mode != "pure":
            item = replace(item, output=self._last(name))
            doubts = [name]
        if doubts:
            self.assumed.add(name)
        if item.state == "skipped":
            self.skipped.add(name)
        if item.output is not None:
            self.outputs[name] = item.output
        return item

    def _planned(self, name: str) -> PlannedStep:
        step = self.graph.step(name)
        if name in self.uncertain:
            reason = "it may or may not have happened: `mlops-ray resolve` says which"
            return PlannedStep(name, step, "uncertain", reason)
        refused = self._reason_to_skip(name)
        if refused is not None:
            return PlannedStep(name, step, "skipped", refused)
        known = self.outputs.keys() | (ensured(self.graph) if step.mode == "effect" else set())
        waiting = sorted(self.graph.needs[name] - known)
        if step.mode == "ensure":
            return PlannedStep(name, step, "run", "makes a state so: runs every time")
        if waiting:
            return PlannedStep(name, step, "depends", f"depends on {', '.join(waiting)}")
        key = key_in(self.graph, name, self.outputs, self.artifacts, self.spec.packages)
        return self._effect(name, key) if step.mode == "effect" else self._pure(name, key)

    def _effect(self, name: str, key: StepKey) -> PlannedStep:
        step, before = self.graph.step(name), self.done.get(name)
        done = before is not None and (before.key == key.key or before.message == SAID_DONE)
        output = before.output if before is not None and done else None
        if output is not None and self.artifacts.verify(output):
            return PlannedStep(name, step, "finished", "done in that run", key, output)
        if output is not None and not step.idempotent and not step.map:
            reason = "it happened, but its output is lost: the run stops and asks"
            return PlannedStep(name, step, "uncertain", reason, key)
        return PlannedStep(name, step, "run", "has effects: runs once in each run", key)

    def _pure(self, name: str, key: StepKey) -> PlannedStep:
        step, own = self.graph.step(name), self.done.get(name)
        found = self.ledger.cached([key.key]).get(key.key)
        for record in (own, found):
            output = record.output if record is not None and record.key == key.key else None
            if output is not None and self.artifacts.verify(output):
                reason = "same code, config and inputs"
                return PlannedStep(name, step, "cached", reason, key, output)
        if found is not None and found.output is not None:
            reason = "its output is missing or corrupt"
            return PlannedStep(name, step, "run", reason, key, calls=self._calls(step, key))
        calls = self._calls(step, key)
        if calls is None:
            return PlannedStep(name, step, "run", "no output with this key yet", key)
        reason = f"{calls[0]:,} of {calls[1]:,} calls are cached"
        return PlannedStep(name, step, "run", reason, key, calls=calls)

    def _calls(self, step: Step, key: StepKey) -> tuple[int, int] | None:
        if not step.map:
            return None
        keys = [
            item_key(key, {name: element_digest(a) for name, a in call.items()}).key
            for call in elements_of(step, self.outputs, self.artifacts)
        ]
        cached = self.ledger.cached(keys)
        intact = {k for k, r in cached.items() if r.output and self.artifacts.verify(r.output)}
        return sum(key in intact for key in keys), len(keys)

    def _reason_to_skip(self, name: str) -> str | None:
        for other in sorted(self.graph.needs[name]):
            if other in self.skipped:
                return f"needs {other}, which would be skipped"
        conditions = self.graph.conditions(name)
        asked = {r.step for r in self.graph.flat[name].asked()}
        if not asked <= self.outputs.keys():
            return None
        try:
            return refusal(conditions, self.outputs, self.artifacts)
        except WorkflowError:
            return None  # the run will say what is wrong with what it then has

    def _last(self, name: str) -> ArtifactRef | None:
        record = self.ledger.latest(self.spec.project, name)
        output = record.output if record is not None else None
        return output if output is not None and self.artifacts.verify(output) else None


def _repeats(names: list[str]) -> str:
    one = len(names) == 1
    return f"{', '.join(names)} {'gives what it' if one else 'give what they'} gave last"
