"""How much may run at once: limits of workflows and steps, and groups that do one thing at a time."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator

from mlops_ray.orchestration.graph import Graph
from mlops_ray.orchestration.work import Work

_FEWEST_TASKS = 4


class Lanes:
    """Holds what is ready, in the order of priority and plan, and what it must not run beside."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._positions = {name: position for position, name in enumerate(graph.order)}
        self._ready: list[tuple[int, int, Work]] = []
        self._listed: set[str] = set()
        self._running: Counter[str] = Counter()
        self._groups: set[str] = set()
        self._tasks = 0

    def add(self, work: Work) -> None:
        """Take in a step of which calls wait."""
        if work.name not in self._listed:
            self._listed.add(work.name)
            entry = (-work.step.priority, self._positions[work.name], work)
            heapq.heappush(self._ready, entry)

    def drop(self, work: Work) -> None:
        """Let go of a step that starts nothing more, so that it can be added anew."""
        if any(entry[-1] is work for entry in self._ready):
            self._ready = [entry for entry in self._ready if entry[-1] is not work]
            heapq.heapify(self._ready)
            self._listed.discard(work.name)

    def startable(self, cpus: Callable[[], int]) -> Iterator[Work]:
        """Yield steps of which a task may start now, the most urgent first; the caller starts it
        before it asks for the next one.

        Args:
            cpus: Says how many CPUs the cluster has: where the workflow does not say how many tasks
                may run at once, as many as there are CPUs run; of those that ask for resources
                twice as many are with Ray, so that it sees a demand for more nodes.
        """
        held = []
        while self._ready and self._is_room(cpus, 2):
            entry = heapq.heappop(self._ready)
            work = entry[-1]
            depth = 2 if _asks(work) else 1
            while work.waiting and self._is_room(cpus, depth) and self._has_room(work):
                yield work
            if work.waiting:
                held.append(entry)
            else:
                self._listed.discard(work.name)
        for entry in held:
            heapq.heappush(self._ready, entry)

    def enter(self, work: Work) -> None:
        """A task of the step has started."""
        self._tasks += 1
        work.running += 1
        self._running.update(self._graph.scopes(work.name))
        if self._group(work):
            self._groups.add(self._group(work))

    def leave(self, work: Work) -> None:
        """A task of the step has ended."""
        self._tasks -= 1
        work.running -= 1
        self._running.subtract(self._graph.scopes(work.name))
        self._groups.discard(self._group(work))

    def _is_room(self, cpus: Callable[[], int], depth: int) -> bool:
        declared = self._graph.limits.get("")
        if declared is not None:
            return self._tasks < declared
        return self._tasks < _FEWEST_TASKS or self._tasks < depth * cpus()

    def _has_room(self, work: Work) -> bool:
        most, limits = work.step.max_parallel, self._graph.limits
        return (
            (most is None or work.running < most)
            and self._group(work) not in self._groups
            and all(
                self._running[scope] < limits[scope]
                for scope in self._graph.scopes(work.name)
                if scope in limits
            )
        )

    def _group(self, work: Work) -> str:
        return "" if work.once else work.step.group or ""


def _asks(work: Work) -> bool:
    asked = work.step.resources
    return bool(asked.num_cpus or asked.num_gpus or asked.custom)
