"""Retention: which artifacts are kept, why, and the removal of all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from mlops_ray.errors import ArtifactError, MlopsRayError, StorageError
from mlops_ray.metadata.artifacts import ArtifactRef, ArtifactStore
from mlops_ray.metadata.blobs import DIGEST, GRACE, Blob
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Link, NewEvent, RunRecord, StepRecord

PINNED = "pinned"
UNPINNED = "unpinned"

Origins = Mapping[str, str | None]
"""Model versions (``flights@7``) and the runs that registered them, where they are known."""


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

    Inputs are found by their digests: the parts of a key may come from another workflow, in which
    the steps have other names. Where a step's inputs are not known, they are all steps.
    """
    by_name = {record.name: record for record in memory.steps if record.item < 0}
    by_digest: dict[str, set[str]] = {}
    for record in by_name.values():
        if record.output is not None:
            by_digest.setdefault(record.output.digest, set()).add(record.name)
    found: set[str] = set()
    waiting = {step} & by_name.keys()
    while waiting:
        name = waiting.pop()
        found.add(name)
        parts = memory.parts.get(by_name[name].key or "")
        sources = None if parts is None else _sources(parts, by_name.keys(), by_digest)
        if sources is None:
            return set(by_name)
        waiting |= sources - found
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
    runs = ledger.runs(limit=None)
    steps: dict[str, list[StepRecord]] = {run.run_id: [] for run in runs}
    for step in ledger.steps_of(steps):
        steps[step.run_id].append(step)
    links: dict[str, list[Link]] = {}
    for link in ledger.links():
        links.setdefault(link.run_id, []).append(link)
    makers = [run_id for run_id in steps if _models(links.get(run_id, ()))]
    parts = ledger.parts_of(
        step.key for run_id in makers for step in steps[run_id] if step.key is not None
    )
    for call in ledger.calls_of(list(steps)):
        steps[call.run_id].append(call)
    return [Memory(run, steps[run.run_id], links.get(run.run_id, ()), parts) for run in runs]


def make_plan(
    ledger: Ledger,
    artifacts: ArtifactStore,
    policy: Policy,
    *,
    registered: Origins | None = None,
) -> list[Verdict]:
    """Find out what collecting would keep and remove, without removing anything.

    Raises:
        ArtifactError: A list of what has to stay is corrupt.
        StorageError: The store cannot be read.
    """
    now = datetime.now(UTC)
    # First what is stored: what is written after this is not looked at.
    blobs = artifacts.stored()
    memories = recall(ledger)
    pins = pins_of(ledger)
    kept = needed(memories, policy, now, pins=pins, registered=registered)
    # No run may name what a person has pinned.
    needs = {digest: "it is pinned" for pin in pins for digest in (pin, *_members(artifacts, pin))}
    for ref, reason in kept.values():
        for digest in _needs(artifacts, ref):
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
        StorageError: The store cannot be written.
    """
    before = datetime.now(UTC) - grace
    with artifacts.writing():
        gone = [
            verdict
            for verdict in plan
            if not verdict.kept and artifacts.blobs.collect(verdict.blob.digest, before)
        ]
        artifacts.blobs.sweep(before)
    return gone


def pin(ledger: Ledger, artifacts: ArtifactStore, thing: str, *, remove: bool = False) -> None:
    """Pin a run (all that its steps made) or an artifact by its digest; or remove such a pin.

    Raises:
        MlopsRayError: It is neither, or not pinned.
    """
    run = ledger.run(thing)
    if remove and thing not in pins_of(ledger):
        raise MlopsRayError(f"{thing!r} is not pinned")
    if not remove and run is None and all(blob.digest != thing for blob in artifacts.stored()):
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


def _sources(
    parts: Mapping[str, Any], names: Collection[str], by_digest: Mapping[str, set[str]]
) -> set[str] | None:
    """Return the steps of a run that gave what a key was made of; None: not known."""
    inputs = (parts.get("inputs") or {}).values()
    said = [one for one in inputs if isinstance(one, Mapping) and isinstance(one.get("step"), str)]
    whole = [one for one in said if "digest" in one]
    found: set[str] = set()
    for one in whole:
        found |= by_digest.get(str(one["digest"]), set())
    if any(str(one["digest"]) not in by_digest for one in whole):
        return None
    # Of a part of an output only the name is known, which counts where the other names hold.
    cut = {str(one["step"]) for one in said if "digest" not in one}
    if cut and not all(one["step"] in by_digest[str(one["digest"])] for one in whole):
        return None
    return found | cut if cut <= set(names) else None


def _needs(artifacts: ArtifactStore, ref: ArtifactRef) -> set[str]:
    try:
        return artifacts.needs(ref)
    except StorageError:
        raise
    except ArtifactError as error:
        raise ArtifactError(
            "what has to stay cannot be told: a list of artifacts is corrupt",
            digest=error.digest,
            where=error.where,
            why=error.what,
            fix="put a good copy of it back; without the file, what it names is collected as well",
        ) from error


def _members(artifacts: ArtifactStore, digest: str) -> list[str]:
    return artifacts.blobs.members(digest) if DIGEST.fullmatch(digest) else []


def _newest(memories: Iterable[Memory], count: int) -> set[str]:
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for memory in memories:
        groups.setdefault((memory.run.project, memory.run.workflow), []).append(memory.run)
    return {
        run.run_id
        for runs in groups.values()
        for run in sorted(runs, key=lambda run: run.started_at, reverse=True)[:count]
    }
