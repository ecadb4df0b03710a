"""A step that is being run: which of its calls wait, which run, what they have returned."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mlops_ray.config.workflow import Step
from mlops_ray.metadata.artifacts import ArtifactRef
from mlops_ray.metadata.records import StepRecord
from mlops_ray.orchestration.keys import StepKey

_BATCH_S = 0.05
_LARGEST_BATCH = 64
_SHARE_OF_NEW = 0.3


class Work:
    """The calls of one step: a single one (item −1), or one for each element of what it maps over.

    ``waiting`` are those that may be started, ``running`` counts tasks. ``earlier`` is how an earlier
    attempt at the run left them. A ``suspended`` work starts nothing more: the artifacts ``lost`` must
    be made again first. ``suspects`` are calls of a batch that crashed: each runs alone.
    ``lacks`` says what it asks for that no node of the cluster has.

    Args:
        name: The step.
        step: Its declaration.
        key: Its key.
        job: What all its calls have in common, pickled.
        elements: What each call of a mapped step gets; None for a step that is not mapped.
        keys: The keys of those calls.
        unasked: Whether it has another key than in the earlier attempt, if it has, only because a
            step before it gave something else.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        key: StepKey,
        job: bytes,
        elements: Sequence[dict[str, Any]] | None = None,
        keys: Sequence[StepKey] = (),
        *,
        unasked: bool = False,
    ) -> None:
        self.name = name
        self.step = step
        self.key = key
        self.job = job
        self.keys = keys
        self.unasked = unasked
        self.suspects: set[int] = set()
        self.is_mapped = elements is not None
        self.once = step.mode == "effect" and not step.idempotent
        self.suspended = False
        self.lost: set[str] = set()
        self.lacks: str | None = None
        self.earlier: dict[int, StepRecord] = {}
        self.running = 0
        self.waiting: deque[int] = deque(range(len(elements)) if elements is not None else (-1,))
        self._elements = elements
        self._outputs: list[ArtifactRef | None] = [None] * len(self.waiting)
        self._left = len(self.waiting)
        self._call_s: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether every call has returned."""
        return self._left == 0

    @property
    def outputs(self) -> list[ArtifactRef]:
        """What the calls returned, once all have."""
        return [output for output in self._outputs if output is not None]

    @property
    def progress(self) -> str:
        """How many of a mapped step's calls are done: ``137/200``."""
        return f"{len(self._outputs) - self._left}/{len(self._outputs)}"

    def key_of(self, item: int) -> StepKey:
        """Return the key of a call."""
        return self.key if item < 0 else self.keys[item]

    def elements_of(self, item: int) -> dict[str, Any]:
        """Return the arguments that a call maps over."""
        return {} if self._elements is None else self._elements[item]

    def is_stale(self, item: int) -> bool:
        """Whether an earlier attempt has begun a call with another key: other code or inputs."""
        record = self.earlier.get(item)
        return record is not None and record.key != self.key_of(item).key

    def returned(self, item: int, output: ArtifactRef) -> None:
        """Take a call's output."""
        self._outputs[max(item, 0)] = output
        self._left -= 1

    def known(self, outputs: dict[int, ArtifactRef]) -> None:
        """Take the outputs of calls that need not run."""
        for item, output in outputs.items():
            self.returned(item, output)
        self.waiting = deque(item for item in self.waiting if item not in outputs)

    def took(self, seconds: float) -> None:
        """Learn how long a call takes."""
        last = self._call_s
        self._call_s = seconds if last is None else last + _SHARE_OF_NEW * (seconds - last)

    def batch(self, lanes: Callable[[], int]) -> int:
        """Return how many calls to send to one worker: more than one only where they are so short
        that sending them one by one would cost more than running them.

        Args:
            lanes: Says how many workers there are to share what waits.
        """
        alone = not self.is_mapped or self.once or self.step.group is not None
        if alone or self.step.timeout is not None or self._call_s is None:
            return 1
        fitting = int(_BATCH_S / max(self._call_s, 1e-4))
        fair = math.ceil(len(self.waiting) / (4 * lanes()))
        most = max(1, min(fitting, fair, _LARGEST_BATCH))
        if not self.suspects:
            return most
        first = itertools.islice(self.waiting, most)
        trusted = itertools.takewhile(lambda item: item not in self.suspects, first)
        return max(1, sum(1 for _ in trusted))
