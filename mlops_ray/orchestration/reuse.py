"""What need not run again: steps whose output is known under their key, and is intact."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from mlops_ray.metadata.artifacts import ArtifactStore
from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import StepRecord

Name = TypeVar("Name", bound=Hashable)

DONE = ("succeeded", "cached")


class Reuse:
    """Finds outputs that can be used again.

    Args:
        ledger: Where finished steps are.
        artifacts: Where their outputs are.
        corrupt: Called with a step whose output was found corrupt or missing, before it is removed.
    """

    def __init__(
        self, ledger: Ledger, artifacts: ArtifactStore, corrupt: Callable[[StepRecord], None]
    ) -> None:
        self._ledger = ledger
        self._artifacts = artifacts
        self._corrupt = corrupt

    def by_key(
        self, keys: Mapping[Name, str], own: Mapping[Name, StepRecord]
    ) -> dict[Name, StepRecord]:
        """Return, of what has these keys, the finished steps whose outputs are intact.

        What the run itself has recorded, ``own``, goes first: others may have depended on it.
        """
        same = ((name, own.get(name), key) for name, key in keys.items())
        kept = {n: r for n, r, key in same if r and r.key == key and self.is_intact(r)}
        left = {name: key for name, key in keys.items() if name not in kept}
        if not left:
            return kept
        found = self._ledger.cached(left.values())
        good = {key: record for key, record in found.items() if self.is_intact(record)}
        return kept | {name: good[key] for name, key in left.items() if key in good}

    def is_intact(self, record: StepRecord) -> bool:
        """Say whether a step is done and its output's bytes are as they were; remove them if not."""
        if record.output is None or record.status not in DONE:
            return False
        if self._artifacts.verify(record.output):
            return True
        self._corrupt(record)
        self._artifacts.discard(record.output.digest)
        return False
