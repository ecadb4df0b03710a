"""How far a run has got in its graph: what is over, what may be opened, what waits for what."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.orchestration.graph import Graph


class Frontier:
    """Tracks the steps of a graph. ``outputs`` are those of the steps that are done, ``skipped`` the
    reasons of those that will not run.

    Args:
        graph: The steps and what must be over before each of them.
        given: Outputs of steps that are not run.
    """

    def __init__(self, graph: Graph, given: Mapping[str, ArtifactRef]) -> None:
        self._graph = graph
        self._waits = {name: set(graph.after[name]) - given.keys() for name in graph.order}
        self._follow: dict[str, list[str]] = {name: [] for name in graph.order}
        for name in graph.order:
            for other in graph.after[name]:
                self._follow[other].append(name)
        self._open: set[str] = set()
        self.outputs: dict[str, ArtifactRef] = {n: r for n, r in given.items() if n in self._waits}
        self.skipped: dict[str, str] = {}
        self._released = [n for n in graph.order if n not in self.outputs and not self._waits[n]]

    @property
    def is_over(self) -> bool:
        """Whether all steps are over."""
        return len(self.outputs) + len(self.skipped) == len(self._waits)

    def take(self) -> list[str]:
        """Return the steps that may be opened now, each of them once."""
        released, self._released = self._released, []
        self._open.update(released)
        return released

    def finish(self, name: str, output: ArtifactRef) -> None:
        """Take the output of a step: it is over."""
        self.outputs[name] = output
        self._pass(name)

    def skip(self, name: str, reason: str) -> None:
        """Take that a step will not run: it is over."""
        self.skipped[name] = reason
        self._pass(name)

    def reopen(self, names: Collection[str], then: str) -> None:
        """Let steps run once more, because their outputs are lost. ``then``, which was open, may be
        opened again after them; so may what was not opened yet."""
        self._open.discard(then)
        # Those that are not done are on their way already.
        lost = [name for name in names if self.outputs.pop(name, None) is not None]
        for name in (then, *lost):
            self._waits[name] = {n for n in self._graph.after[name] if not self._is_over(n)}
        self._released += lost
        for name in lost:
            for other in self._follow[name]:
                if not self._is_over(other) and other not in self._open:
                    self._waits[other].add(name)
        if not self._waits[then]:
            self._released.append(then)
        self._released = [name for name in self._released if not self._waits[name]]

    def _is_over(self, name: str) -> bool:
        return name in self.outputs or name in self.skipped

    def _pass(self, name: str) -> None:
        self._open.discard(name)
        for other in self._follow[name]:
            if name in self._waits[other]:
                self._waits[other].remove(name)
                if not self._waits[other] and not self._is_over(other) and other not in self._open:
                    self._released.append(other)
