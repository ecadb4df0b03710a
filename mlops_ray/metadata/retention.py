"""Retention: which artifacts are kept, why, and the removal of all others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from mlops_ray.errors import MlopsRayError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.blobs import GRACE, Blob
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Link, NewEvent, RunRecord, StepRecord

PINNED = "pinned"
UNPINNED = "unpinned"

Origins = Mapping[str, str | None]
"""Model versions (``flights@7``) and the runs that registered them, where they are known."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ALL = 1_000_000_000


@dataclass(frozen=True)
class Policy:
    """How long artifacts are kept that nothing needs.

    Args:
        older_than: Runs that ended within this time keep theirs.
        keep_runs: So many newest runs of each workflow keep theirs, however old.
        grace: What was written or used within this time is kept: a run may be about to name it.
    """

    older_than: timedelta = timedelta(days=30)
    keep_runs: int = 10
    grace: timedelta = GRACE


@dataclass(frozen=True)
class Memory:
    """What of a run counts for retention.

    Args:
        run: The run.
        steps: Its steps, and the calls of mapped ones.
        links: What its steps read and wrote by name.
        parts: What the keys of its steps were made of, by key.
    """

    run: RunRecord
    steps: Sequence[StepRecord]
    links: Sequence[Link] = ()
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def changes(self) -> list[ArtifactRef]:
        """The uncommitted changes that it ran with, if there are any."""
        kept = self.run.provenance.get("changes")
        return [ArtifactRef.model_validate(kept)] if kept else []


@dataclass(frozen=True)
class Verdict:
    """What happens to one blob, and why."""

    blob: Blob
    kept: bool
    reason: str
    made_by: str = ""


def needed(
    memories: Sequence[Memory],
    policy: Policy,
    now: datetime,
    *,
    pins: Iterable[str] = (),
    registered: Origins | None = None,
) -> dict[str, tuple[ArtifactRef, str]]:
    """Return the artifacts that have to stay, by digest, each with the reason.

    Args:
        memories: All runs.
        policy: How long to keep what nothing needs.
        now: The present.
        pins: Run ids and digests that a person has pinned.
        registered: The model versions that exist; None: all that were ever made.
    """
    found: dict[str, tuple[ArtifactRef, str]] = {}

    def keep(refs: Iterable[ArtifactRef], reason: str) -> None:
        for ref in refs:
            found.setdefault(ref.digest, (ref, reason))

    pinned = set(pins)
    for memory in memories:
        for ref, model in _of_models(memory, registered):
            keep([ref], f"model {model} needs it")
    for memory in memories:
        if memory.run.run_id in pinned:
            keep(_outputs(memory), f"run {memory.run.run_id} is pinned")
        keep((ref for ref in _outputs(memory) if ref.digest in pinned), "it is pinned")
    newest = _newest(memories, policy.keep_runs)
    for memory in memories:
        run = memory.run
        if run.ended_at is None or run.status == "running":
            keep(_outputs(memory), f"run {run.run_id} is not over")
        elif run.run_id in newest:
            keep(_outputs(memory), f"one of the newest {policy.keep_runs} runs of {run.workflow}")
        elif now - run.ended_at < policy.older_than:
            keep(_outputs(memory), f"of a run younger than {policy.older_than.days} d")
    return found


def upstream(memory: Memory, step: str) -> set[str]:
    """Return the steps of a run that a step's inputs come from, however far, and the step itself.

    Where the key of a step is not known, neither are its inputs: then they are all steps.
    """
    by_name = {record.name: record for record in memory.steps if record.item < 0}
    found: set[str] = set()
    waiting = [step]
    while waiting:
        name = waiting.pop()
        if name in found or name not in by_name:
            continue
        found.add(name)
        parts = memory.parts.get(by_name[name].key or "")
        if parts is None:
            return set(by_name)
        waiting += [source for source, _ in _sources(parts.get("inputs"))]
    return found


def judge(
    blobs: Iterable[Blob],
    needs: Mapping[str, str],
    makers: Mapping[str, str],
    before: datetime,
) -> Iterator[Verdict]:
    """Say of each blob whether it is kept, and why.

    Args:
        blobs: What is stored.
        needs: The digests that have to stay, each with the reason.
        makers: Which step of which run made an artifact, for people.
        before: What was written or used later stays.
    """
    for blob in blobs:
        maker = makers.get(blob.digest, "")
        if blob.digest in needs:
            yield Verdict(blob, True, needs[blob.digest], maker)
        elif blob.used_at >= before:
            yield Verdict(blob, True, "written or used a short time ago", maker)
        elif maker:
            yield Verdict(blob, False, "only old runs name it", maker)
        else:
            yield Verdict(blob, False, "no run names it")


def recall(ledger: Ledger) -> list[Memory]:
    """Read what retention has to know of all runs."""
    memories = []
    for run in ledger.runs(limit=_ALL):
        steps = ledger.steps(run.run_id)
        calls = [
            item
            for step in steps
            if step.output is None or step.output.kind == "list"
            for item in ledger.items(run.run_id, step.name)
        ]
        links = ledger.links(run_id=run.run_id)
        parts = _key_parts(ledger, steps) if _models(links) else {}
        memories.append(Memory(run, [*steps, *calls], links, parts))
    return memories


def make_plan(
    ledger: Ledger,
    artifacts: ArtifactStore,
    policy: Policy,
    *,
    registered: Origins | None = None,
) -> list[Verdict]:
    """Find out what collecting would keep and remove, without removing anything."""
    now = datetime.now(UTC)
    # First what is stored: what is written after this is not looked at.
    blobs = list(artifacts.blobs.blobs())
    memories = recall(ledger)
    pins = pins_of(ledger)
    kept = needed(memories, policy, now, pins=pins, registered=registered)
    # No run may name what a person has pinned.
    needs = {digest: "it is pinned" for pin in pins for digest in (pin, *_members(artifacts, pin))}
    for ref, reason in kept.values():
        for digest in artifacts.needs(ref):
            needs.setdefault(digest, reason)
    makers = {
        step.output.digest: f"{memory.run.run_id}/{step.name}"
        for memory in memories
        for step in memory.steps
        if step.output is not None
    }
    return list(judge(blobs, needs, makers, now - policy.grace))


def collect(artifacts: ArtifactStore, plan: Iterable[Verdict], grace: timedelta) -> list[Verdict]:
    """Remove what the plan does not keep, and forgotten drafts; return what is gone.

    What somebody has begun to use since the plan was made stays. Steps whose output is gone stay in
    the ledger: where a run would have taken it from the cache, it makes it anew.

    Raises:
        OSError: The store cannot be written.
    """
    before = datetime.now(UTC) - grace
    gone = [
        verdict
        for verdict in plan
        if not verdict.kept and artifacts.blobs.collect(verdict.blob.digest, before)
    ]
    artifacts.blobs.sweep(before)
    return gone


def pin(ledger: Ledger, thing: str, *, remove: bool = False) -> None:
    """Pin a run (all that its steps made) or an artifact by its digest; or remove such a pin.

    Raises:
        MlopsRayError: It is neither.
    """
    run = ledger.run(thing)
    if run is None and not _DIGEST.fullmatch(thing):
        raise MlopsRayError(
            f"{thing!r} is neither a run nor the digest of an artifact",
            fix="list runs with `mlops-ray status`, artifacts with `mlops-ray gc --dry-run --json`",
        )
    kind = UNPINNED if remove else PINNED
    event = NewEvent(project=run.project if run else "", kind=kind, data={"thing": thing})
    ledger.apply([event])


def pins_of(ledger: Ledger) -> set[str]:
    """Return the run ids and digests that are pinned."""
    events = [*ledger.events(kind=PINNED), *ledger.events(kind=UNPINNED)]
    pinned: set[str] = set()
    for event in sorted(events, key=lambda event: event.id):
        thing = str(event.data["thing"])
        pinned.add(thing) if event.kind == PINNED else pinned.discard(thing)
    return pinned


def sums(verdicts: Iterable[Verdict]) -> dict[tuple[bool, str], tuple[int, int]]:
    """Return the number and the bytes of blobs for each (kept, reason), the largest first."""
    counts: Counter[tuple[bool, str]] = Counter()
    sizes: Counter[tuple[bool, str]] = Counter()
    for verdict in verdicts:
        counts[verdict.kept, verdict.reason] += 1
        sizes[verdict.kept, verdict.reason] += verdict.blob.size
    return {group: (counts[group], size) for group, size in sizes.most_common()}


def _outputs(memory: Memory) -> list[ArtifactRef]:
    made = [step.output for step in memory.steps if step.output is not None]
    return made + memory.changes


def _of_models(memory: Memory, registered: Origins | None) -> Iterator[tuple[ArtifactRef, str]]:
    written = {link.name: upstream(memory, link.step) for link in _models(memory.links)}
    every = {step.name for step in memory.steps}
    # A version whose registration left no link needs everything of its run.
    for model, run_id in (registered or {}).items():
        if run_id == memory.run.run_id:
            written.setdefault(model, every)
    for model, names in written.items():
        if registered is None or model in registered:
            made = [step.output for step in memory.steps if step.name in names]
            for ref in (*made, *memory.changes):
                if ref is not None:
                    yield ref, model


def _models(links: Iterable[Link]) -> list[Link]:
    return [link for link in links if link.kind == "model" and link.direction == "writes"]


def _sources(value: Any) -> Iterator[tuple[str, str | None]]:
    """Find the references to other steps' outputs in what a key was made of."""
    if isinstance(value, Mapping):
        if isinstance(value.get("step"), str):
            yield value["step"], value.get("digest")
        for item in value.values():
            yield from _sources(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sources(item)


def _key_parts(ledger: Ledger, steps: Iterable[StepRecord]) -> dict[str, Mapping[str, Any]]:
    found = {step.key: ledger.key_parts(step.key) for step in steps if step.key}
    return {key: parts for key, parts in found.items() if parts is not None}


def _members(artifacts: ArtifactStore, digest: str) -> list[str]:
    return artifacts.blobs.members(digest) if _DIGEST.fullmatch(digest) else []


def _newest(memories: Iterable[Memory], count: int) -> set[str]:
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for memory in memories:
        groups.setdefault((memory.run.project, memory.run.workflow), []).append(memory.run)
    return {
        run.run_id
        for runs in groups.values()
        for run in sorted(runs, key=lambda run: run.started_at, reverse=True)[:count]
    }
