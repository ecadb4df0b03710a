"""Whether a step has another key because somebody changed something, or only because a step before it
ran once more and gave something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlops_ray.metadata.ledger import Ledger
from mlops_ray.metadata.records import StepRecord
from mlops_ray.orchestration.keys import StepKey

_BY_HAND = ("target", "code", "environment")


class Drift:
    """Compares the keys of a run's steps with those of its earlier attempt.

    Args:
        ledger: Where the parts of keys are.
        earlier: The steps as the earlier attempt left them, by name.
    """

    def __init__(self, ledger: Ledger, earlier: Mapping[str, StepRecord]) -> None:
        self._ledger = ledger
        self._earlier = earlier
        self._keys: dict[str, StepKey] = {}

    def note(self, name: str, key: StepKey) -> None:
        """Take the key that a step has now."""
        self._keys[name] = key

    def is_unasked(self, name: str) -> bool:
        """Say whether nobody has changed anything of a step or of what it depends on: its key is what
        it was, or differs only in outputs of steps of which the same is true."""
        key, record = self._keys.get(name), self._earlier.get(name)
        if key is None or record is None or record.key is None:
            return False
        if key.key == record.key:
            return True
        before = self._ledger.key_parts(record.key)
        if before is None:
            return True  # nobody can tell
        now = json.loads(json.dumps(key.parts, default=str))
        if any(before.get(part) != now.get(part) for part in _BY_HAND):
            return False
        old, new = before["inputs"], now["inputs"]
        same_names = old.keys() == new.keys()
        return same_names and all(self._is_fed(old[name], new[name]) for name in new)

    def _is_fed(self, old: Any, new: Any) -> bool:
        if old == new:
            return True
        places = [(given.get("step"), given.get("part")) for given in (old, new)]
        return places[0] == places[1] and places[0][0] is not None and self.is_unasked(new["step"])
