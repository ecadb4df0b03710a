"""Opening steps: of those whose turn has come, which are skipped, known already, or are to run."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlops_ray.errors import ArtifactError, WorkflowError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Lease, StepRecord
from mlops_ray.orchestration import capacity, resolution
from mlops_ray.orchestration.drift import Drift
from mlops_ray.orchestration.effects import Effects
from mlops_ray.orchestration.frontier import Frontier
from mlops_ray.orchestration.graph import Graph
from mlops_ray.orchestration.keys import StepKey, item_key
from mlops_ray.orchestration.once import SAID_DONE
from mlops_ray.orchestration.plan import key_in
from mlops_ray.orchestration.recording import Recorder
from mlops_ray.orchestration.retries import digest_of
from mlops_ray.orchestration.reuse import DONE, Reuse
from mlops_ray.orchestration.spec import RunSpec
from mlops_ray.orchestration.tracing import settings
from mlops_ray.orchestration.work import Work
from mlops_ray.orchestration.worker import Job


@dataclass
class Opened:
    """What became of steps: those to run, and for those whose inputs could not be read, the digest of
    the artifact that is lost."""

    works: list[Work] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def reading(self, name: str, recorder: Recorder) -> Iterator[None]:
        """Note that an artifact was missing or corrupt; record any other error as the step's."""
        try:
            yield
        except (ArtifactError, WorkflowError) as error:
            digest = digest_of(error)
            if digest is None:
                recorder.set(
                    name,
                    "failed",
                    ended_at=datetime.now(UTC),
                    error=error.what,
                    message=error.what,
                    said={"reason": str(error)},
                )
                raise
            self.unreadable[name] = digest


class Opener:
    """Decides what becomes of steps that nothing keeps waiting any more.

    Args:
        spec: The run's spec.
        graph: The steps.
        frontier: Where outputs and skips are entered.
        recorder: Where they are recorded.
        ledger: Where outputs of before are looked up.
        artifacts: Where they are.
        fence: The lease under which workers may write.
        earlier: The steps of this run's earlier attempts, by name.
        effects: Asks about effects that must not happen twice.
    """

    def __init__(
        self,
        spec: RunSpec,
        graph: Graph,
        frontier: Frontier,
        recorder: Recorder,
        ledger: Ledger,
        artifacts: ArtifactStore,
        fence: Lease,
        earlier: Mapping[str, StepRecord],
        effects: Effects,
    ) -> None:
        self._spec = spec
        self._graph = graph
        self._frontier = frontier
        self._recorder = recorder
        self._ledger = ledger
        self._artifacts = artifacts
        self._fence = fence
        self._earlier = earlier
        self._effects = effects
        self._drift = Drift(ledger, earlier)
        self._run_id = recorder.run.run_id
        self._reuse = Reuse(ledger, artifacts, self._say_corrupt)

    def open(self, names: Iterable[str]) -> Opened:
        """Enter what is skipped or known already, and return what is to run."""
        opened = Opened()
        keys: dict[str, StepKey] = {}
        for name in names:
            with opened.reading(name, self._recorder):
                if not self._skip(name):
                    keys[name] = self._key(name)
        for name, record in self._known(keys).items():
            self._take_over(name, -1, record, self._earlier.get(name))
            assert record.output is not None
            self._frontier.finish(name, record.output)
            del keys[name]
        for name, key in keys.items():
            with opened.reading(name, self._recorder):
                opened.works.append(self._work(name, key))
                self._look_for_room(opened.works[-1])
        return opened

    def _known(self, keys: Mapping[str, StepKey]) -> dict[str, StepRecord]:
        modes = {name: self._graph.step(name).mode for name in keys}
        pure = {n: k.key for n, k in keys.items() if modes[n] == "pure"}
        found = self._reuse.by_key(pure, self._earlier)
        for name, key in keys.items():
            record = self._earlier.get(name)
            if modes[name] == "effect" and record is not None and self._is_done(record, key):
                found[name] = record
        return found

    def _skip(self, name: str) -> bool:
        reason = self._reason_to_skip(name)
        if reason is None:
            return False
        self._recorder.set(
            name, "skipped", message=reason, ended_at=datetime.now(UTC), said={"reason": reason}
        )
        self._frontier.skip(name, reason)
        return True

    def _reason_to_skip(self, name: str) -> str | None:
        for other in sorted(self._graph.needs[name]):
            if other in self._frontier.skipped:
                return f"needs {other}, which was skipped"
        return resolution.refusal(
            self._graph.conditions(name), self._frontier.outputs, self._artifacts
        )

    def _key(self, name: str) -> StepKey:
        outputs, packages = self._frontier.outputs, self._spec.packages
        key = key_in(self._graph, name, outputs, self._artifacts, packages)
        self._drift.note(name, key)
        return key

    def _is_done(self, record: StepRecord, key: StepKey) -> bool:
        # What a person has said was done is not done again because its code has changed since.
        same = record.key == key.key or record.message == SAID_DONE
        if same and self._reuse.is_intact(record):
            return True
        step = self._graph.step(record.name)
        if not step.idempotent and (record.item >= 0 or not step.map):
            self._enforce_once(record, key, same=same)
        return False

    def _enforce_once(self, record: StepRecord, key: StepKey, *, same: bool) -> None:
        """Stop before an effect that has happened happens again, unless somebody wants it to."""
        if record.status == "uncertain":
            raise self._effects.unresolved(record)
        if record.status in DONE and same:
            raise self._effects.lost(record)
        if record.status in DONE and self._drift.is_unasked(record.name):
            raise self._effects.remade(record.name, record.item, key.key)

    def _take_over(
        self, name: str, item: int, record: StepRecord, before: StepRecord | None
    ) -> None:
        """Record an output that is known; what an earlier attempt has recorded so stays."""
        if before is not None and before.status in DONE and before.output == record.output:
            return
        self._recorder.set(
            name,
            "cached",
            item=item,
            key=record.key,
            output=record.output,
            rows=record.rows,
            metrics=record.metrics,
            params=record.params,
            started_at=None,
            ended_at=datetime.now(UTC),
            said={"from": record.run_id},
        )

    def _work(self, name: str, key: StepKey) -> Work:
        step = self._graph.step(name)
        job = self._job(name)
        self._recorder.key(key)
        before = self._earlier.get(name)
        unasked = not step.idempotent and self._drift.is_unasked(name)
        if not step.map:
            work = Work(name, step, key, job, unasked=unasked)
            work.earlier = {-1: before} if before is not None else {}
            return work
        elements = resolution.elements_of(step, self._frontier.outputs, self._artifacts)
        keys = [item_key(key, _digests(call)) for call in elements]
        work = Work(name, step, key, job, elements, keys, unasked=unasked)
        calls = self._ledger.items(self._run_id, name) if before is not None else []
        work.earlier = {call.item: call for call in calls}
        work.known(self._known_calls(work))
        return work

    def _look_for_room(self, work: Work) -> None:
        """Say that no node can hold a step; refuse where none will come."""
        work.lacks = capacity.shortage(work.step.resources) if work.waiting else None
        if work.lacks is None:
            return
        if not capacity.may_grow():
            fix = "ask for less in its `resources`, or run it on a cluster that has such a node"
            raise WorkflowError(work.lacks, where=f"step {work.name}", fix=fix)
        self._recorder.event("step_waits_for_node", work.name, reason=work.lacks)

    def _known_calls(self, work: Work) -> dict[int, ArtifactRef]:
        before, found = work.earlier, dict[int, StepRecord]()
        if work.step.mode == "pure":
            found = self._reuse.by_key({i: key.key for i, key in enumerate(work.keys)}, before)
        elif work.step.mode == "effect":
            pairs = ((item, before.get(item), key) for item, key in enumerate(work.keys))
            found = {i: call for i, call, key in pairs if call and self._is_done(call, key)}
        for item, record in found.items():
            self._take_over(work.name, item, record, before.get(item))
        return {item: record.output for item, record in found.items() if record.output is not None}

    def _job(self, name: str) -> bytes:
        spec, step = self._spec, self._graph.step(name)
        assert step.uses is not None
        return pickle.dumps(
            Job(
                project=spec.project,
                home=spec.home,
                run_id=self._run_id,
                step=name,
                target=step.uses,
                arguments=resolution.arguments_of(step, self._frontier.outputs, self._artifacts),
                roots=spec.roots,
                command=spec.command,
                packages=spec.packages,
                pickle=step.pickle,
                fence=self._fence,
                tracing=settings() if self._recorder.is_traced else {},
                timeout_s=step.timeout.total_seconds() if step.timeout else None,
            )
        )

    def _say_corrupt(self, record: StepRecord) -> None:
        assert record.output is not None
        digest = record.output.digest
        self._recorder.lost(record.name, record.item, digest, found_by="cache")


def _digests(call: dict[str, Any]) -> dict[str, Any]:
    return {name: resolution.element_digest(argument) for name, argument in call.items()}
