"""Lineage: what everything was made from, and what was made from it, as one graph."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import Link, RunRecord, StepRecord

Kind = Literal["source", "view", "step", "artifact", "model", "deployment"]
Direction = Literal["up", "down"]
Edge = tuple[str, str]

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Node:
    """One thing. ``id`` begins with the kind: ``model:flights@7``, ``step:RUN/fit``.

    ``detail`` holds what is known of it, as JSON values.
    """

    id: str
    kind: Kind
    name: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lineage:
    """A graph whose edges lead from what was used to what came of it.

    ``runs`` names the steps of each run; one that was cached there is the step that made its output.
    """

    nodes: Mapping[str, Node]
    edges: frozenset[Edge]
    runs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def up(self) -> Mapping[str, tuple[str, ...]]:
        """What each node came of, in a stable order."""
        return _neighbours((target, source) for source, target in self.edges)

    @cached_property
    def down(self) -> Mapping[str, tuple[str, ...]]:
        """What came of each node, in a stable order."""
        return _neighbours(self.edges)

    def reach(
        self, starts: Iterable[str], direction: Direction, depth: int | None = None
    ) -> frozenset[str]:
        """Return the starts and all that lies above or below them, at most ``depth`` edges away."""
        neighbours = self.up if direction == "up" else self.down
        found = frontier = set(starts)
        while frontier and (depth is None or depth > 0):
            frontier = {other for node in frontier for other in neighbours.get(node, ())} - found
            found = found | frontier
            depth = None if depth is None else depth - 1
        return frozenset(found)

    def around(
        self,
        starts: Iterable[str],
        directions: Iterable[Direction] = ("up", "down"),
        depth: int | None = None,
    ) -> Lineage:
        """Return the part that ``reach`` finds, with the edges inside what is above and below."""
        parts = [self.reach(starts, direction, depth) for direction in directions]
        kept = frozenset().union(*parts)
        edges = {e for e in self.edges if any(e[0] in part and e[1] in part for part in parts)}
        return Lineage({i: n for i, n in self.nodes.items() if i in kept}, frozenset(edges))

    def folded(self) -> Lineage:
        """Return the graph with each artifact told by the step that made it: ``detail["output"]``."""
        outputs = {a: s for s, a in self.edges if self._kind(a) == "artifact" and s in self.nodes}
        nodes = {i: n for i, n in self.nodes.items() if i not in outputs}
        for artifact, step in outputs.items():
            told = {**nodes[step].detail, "output": dict(self.nodes[artifact].detail)}
            nodes[step] = Node(step, "step", nodes[step].name, told)
        edges = {
            (outputs.get(source, source), target)
            for source, target in self.edges
            if target not in outputs
        }
        return Lineage(nodes, frozenset(edges), self.runs)

    def to_json(self) -> dict[str, Any]:
        """Return nodes and edges as JSON values, in an order that depends on nothing else."""
        nodes = [
            {"id": node.id, "kind": node.kind, "name": node.name, "detail": dict(node.detail)}
            for node in sorted(self.nodes.values(), key=lambda node: node.id)
        ]
        return {"nodes": nodes, "edges": [list(edge) for edge in sorted(self.edges)]}

    def _kind(self, node: str) -> str:
        return node.partition(":")[0]


def read_lineage(ledger: Ledger) -> Lineage:
    """Return the lineage of everything that a ledger knows."""
    runs = ledger.runs(limit=None)
    steps = ledger.steps_of(run.run_id for run in runs)
    keys = {step.key for step in steps if step.key and step.status == "succeeded"}
    return build(runs, steps, ledger.links(), ledger.parts_of(sorted(keys)))


def build(
    runs: Iterable[RunRecord],
    steps: Iterable[StepRecord],
    links: Iterable[Link],
    parts: Mapping[str, Mapping[str, Any]],
) -> Lineage:
    """Make the graph of records of the ledger.

    Steps that ran, and what they gave, are nodes; a step that was cached stands for the one that
    ran with its key. Versions of a view follow each other, since each holds the rows of those before.

    Args:
        runs: All runs.
        steps: All steps of these runs, without the calls of mapped ones.
        links: What steps have read and written by name.
        parts: By cache key, what it was made of.
    """
    return _Builder({run.run_id: run for run in runs}, list(steps), parts).build(links)


class _Builder:
    """The graph in the making."""

    def __init__(
        self,
        runs: Mapping[str, RunRecord],
        steps: list[StepRecord],
        parts: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._runs = runs
        self._parts = parts
        self._origins = _origins(steps)
        self._steps = steps
        self._nodes: dict[str, Node] = {}
        self._edges: set[Edge] = set()
        self._by_digest: dict[str, list[str]] = defaultdict(list)
        self._given = {(s.run_id, s.name): s.output.digest for s in steps if s.output is not None}
        self._givers: dict[tuple[str, str], list[str]] = defaultdict(list)
        for (run_id, name), digest in self._given.items():
            self._givers[run_id, digest].append(name)

    def build(self, links: Iterable[Link]) -> Lineage:
        for step in self._steps:
            if self._origins.get((step.run_id, step.name)) == (step.run_id, step.name):
                self._add_step(step)
        for step in self._steps:
            self._add_inputs(step)
        for link in links:
            self._add_link(link)
        self._add_successions()
        runs: dict[str, list[str]] = defaultdict(list)
        for (run_id, _), (origin, name) in self._origins.items():
            runs[run_id].append(f"step:{origin}/{name}")
        told = {run_id: tuple(names) for run_id, names in runs.items()}
        return Lineage(self._nodes, frozenset(self._edges), told)

    def _add_step(self, step: StepRecord) -> None:
        run = self._runs[step.run_id]
        node = f"step:{step.run_id}/{step.name}"
        detail: dict[str, Any] = {
            "run": step.run_id,
            "step": step.name,
            "project": run.project,
            "workflow": run.workflow,
            "status": step.status,
            "key": step.key,
            "commit": run.provenance.get("commit"),
            "ended_at": step.ended_at.isoformat() if step.ended_at else None,
        }
        self._nodes[node] = Node(node, "step", step.name, detail)
        if step.output is None:
            return
        artifact = f"artifact:{step.run_id}/{step.name}"
        told = step.output.model_dump(mode="json", exclude_none=True)
        self._nodes[artifact] = Node(artifact, "artifact", step.output.digest[:12], told)
        self._by_digest[step.output.digest].append(artifact)
        self._edges.add((node, artifact))

    def _add_inputs(self, step: StepRecord) -> None:
        node = f"step:{step.run_id}/{step.name}"
        if node not in self._nodes or step.key is None:
            return
        for said in _references(self._parts.get(step.key, {}).get("inputs", {})):
            self._edges |= {(artifact, node) for artifact in self._read(step.run_id, said)}

    def _read(self, run_id: str, said: Mapping[str, Any]) -> list[str]:
        """Return the artifacts that the parts of a key mean in a run.

        The key may have been made in another workflow, where that step has another name, or another
        step has that one: only the digest is sure to be the same.
        """
        name, digest = str(said["step"]), str(said.get("digest") or "")
        # The digest of a part of an output is not that of the output.
        if digest and "part" not in said and self._given.get((run_id, name)) != digest:
            names = self._givers.get((run_id, digest), [])
        else:
            names = [name]
        origins = [self._origins.get((run_id, name)) for name in names]
        found = [f"artifact:{origin[0]}/{origin[1]}" for origin in origins if origin]
        return [one for one in found if one in self._nodes] or self._by_digest.get(digest, [])

    def _add_link(self, link: Link) -> None:
        step = f"step:{link.run_id}/{link.step}"
        if step not in self._nodes:
            return
        for other in self._named(link):
            self._edges.add((other, step) if link.direction == "reads" else (step, other))

    def _named(self, link: Link) -> list[str]:
        if link.kind == "artifact":
            return self._by_digest.get(link.name, [])
        project = self._runs[link.run_id].project
        scope = f"{project}/" if link.kind in ("source", "view") else ""
        node = f"{link.kind}:{scope}{link.name}"
        detail = {"project": project} if scope else {}
        self._nodes.setdefault(node, Node(node, link.kind, link.name, detail))
        return [node]

    def _add_successions(self) -> None:
        versions: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for node in self._nodes.values():
            view, _, version = node.id.rpartition("@")
            if node.kind == "view" and version.isdecimal():
                versions[view].append((int(version), node.id))
        readers: dict[str, set[str]] = defaultdict(set)
        for source, target in self._edges:
            readers[source].add(target)
        for known in versions.values():
            ordered = [node for _, node in sorted(known)]
            for before, after in pairwise(ordered):
                if not any(after in readers[step] for step in readers[before]):
                    self._edges.add((before, after))


def _origins(steps: Iterable[StepRecord]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return for each step that is done, by run and name, the one that made its output."""
    done = [step for step in steps if step.status in ("succeeded", "cached")]
    made: dict[str, list[tuple[datetime, tuple[str, str]]]] = defaultdict(list)
    for step in done:
        if step.status == "succeeded" and step.key:
            made[step.key].append((step.ended_at or _LONG_AGO, (step.run_id, step.name)))
    for found in made.values():
        found.sort()
    origins = {}
    for step in done:
        here = (step.run_id, step.name)
        known = made.get(step.key or "", []) if step.status == "cached" else []
        place = bisect_right(known, (step.ended_at or _LONG_AGO, ("\uffff", "")))
        origins[here] = known[max(place - 1, 0)][1] if known else here
    return origins


def _references(inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what the parts of a key say of outputs of other steps."""
    for said in inputs.values():
        if isinstance(said, Mapping) and isinstance(said.get("step"), str):
            yield said


def _neighbours(edges: Iterable[Edge]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = defaultdict(set)
    for source, target in edges:
        found[source].add(target)
    return {node: tuple(sorted(others)) for node, others in found.items()}
