"""Opening steps: of those whose turn has come, which are skipped, known already, or are to run."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Lease, StepRecord
from mlops_ray.orchestration import resolution
from mlops_ray.orchestration.frontier import Frontier
from mlops_ray.orchestration.graph import Graph
from mlops_ray.orchestration.keys import StepKey, item_key
from mlops_ray.orchestration.plan import key_in
from mlops_ray.orchestration.recording import Recorder
from mlops_ray.orchestration.reuse import Reuse
from mlops_ray.orchestration.spec import RunSpec
from mlops_ray.orchestration.work import Work
from mlops_ray.orchestration.worker import Job


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
    ) -> None:
        self._spec = spec
        self._graph = graph
        self._frontier = frontier
        self._recorder = recorder
        self._ledger = ledger
        self._artifacts = artifacts
        self._fence = fence
        self._earlier = earlier
        self._reuse = Reuse(ledger, artifacts, self._say_corrupt)

    def open(self, names: Iterable[str]) -> list[Work]:
        """Enter what is skipped or known already, and return what is to run.

        Raises:
            ArtifactError: An output that decides cannot be read; ``step`` says who wanted it.
        """
        keys = {name: self._key(name) for name in names if not self._skip(name)}
        pure = {n: key.key for n, key in keys.items() if self._graph.step(n).mode == "pure"}
        found = self._reuse.by_key(pure)
        found |= {name: record for name in keys if (record := self._done_effect(name, keys[name]))}
        for name, record in found.items():
            self._take_over(name, record)
        return [
            work
            for name, key in keys.items()
            if name not in found and (work := self._work(name, key)) is not None
        ]

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
        return key_in(self._graph, name, outputs, self._artifacts, packages)

    def _done_effect(self, name: str, key: StepKey) -> StepRecord | None:
        record = self._earlier.get(name)
        if record is None or self._graph.step(name).mode != "effect" or record.key != key.key:
            return None
        return record if self._reuse.is_intact(record) else None

    def _take_over(self, name: str, record: StepRecord) -> None:
        assert record.output is not None
        before = self._earlier.get(name)
        if before is None or before.status not in ("succeeded", "cached") or before.key != record.key:
            self._recorder.set(
                name,
                "cached",
                key=record.key,
                output=record.output,
                rows=record.rows,
                metrics=record.metrics,
                params=record.params,
                started_at=None,
                ended_at=datetime.now(UTC),
                said={"from": record.run_id},
            )
        self._frontier.finish(name, record.output)

    def _work(self, name: str, key: StepKey) -> Work | None:
        step = self._graph.step(name)
        self._recorder.key(key)
        job = self._job(name)
        if not step.map:
            return Work(name, step, key, job)
        outputs = self._frontier.outputs
        elements = resolution.elements_of(step, outputs, self._artifacts)
        keys = [item_key(key, _digests(call)) for call in elements]
        work = Work(name, step, key, job, elements, keys)
        work.known(self._known_calls(name, step.mode, keys))
        return work

    def _known_calls(self, name: str, mode: str, keys: list[StepKey]) -> dict[int, ArtifactRef]:
        before = {}
        if name in self._earlier:
            before = {record.item: record for record in self._ledger.items(self._recorder.run.run_id, name)}
        if mode == "pure":
            found = self._reuse.by_key({item: key.key for item, key in enumerate(keys)})
        elif mode == "effect":
            found = {
                item: record
                for item, key in enumerate(keys)
                if (record := before.get(item)) is not None
                and record.key == key.key
                and self._reuse.is_intact(record)
            }
        else:
            found = {}
        for item, record in found.items():
            if item not in before or before[item].key != record.key or before[item].status not in ("succeeded", "cached"):
                self._recorder.set(name, "cached", item=item, key=record.key, output=record.output, rows=record.rows, metrics=record.metrics, params=record.params, started_at=None, ended_at=datetime.now(UTC), said={"from": record.run_id})
        return {item: record.output for item, record in found.items() if record.output is not None}

    def _job(self, name: str) -> bytes:
        spec, step = self._spec, self._graph.step(name)
        assert step.uses is not None
        return pickle.dumps(
            Job(
                project=spec.project,
                home=spec.home,
                run_id=self._recorder.run.run_id,
                step=name,
                target=step.uses,
                arguments=resolution.arguments_of(step, self._frontier.outputs, self._artifacts),
                roots=spec.roots,
                command=spec.command,
                packages=spec.packages,
                pickle=step.pickle,
                fence=self._fence,
                timeout_s=step.timeout.total_seconds() if step.timeout else None,
            )
        )

    def _say_corrupt(self, record: StepRecord) -> None:
        assert record.output is not None
        self._recorder.event(
            "artifact_corrupt",
            record.name,
            record.item,
            digest=record.output.digest,
            found_by="cache",
        )


def _digests(call: dict[str, Any]) -> dict[str, Any]:
    return {name: resolution.element_digest(argument) for name, argument in call.items()}
