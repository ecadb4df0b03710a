"""What a read does when the online store cannot be reached: fail, find nothing, or use old rows."""

from __future__ import annotations

import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

from mlops_ray.errors import FeatureStoreError

Mode = Literal["error", "missing", "stale"]

MOST_KEPT = 100_000
"""Rows of each view that a reader keeps for bad times, the ones last read."""

Encoded = Sequence[Sequence[bytes | None]]
Found = list[list[bytes | None]]


class ServerGoneError(FeatureStoreError):
    """A store does not answer. A refusal, also of a password, is no such error."""


class _Last(threading.local):
    """What a thread's last read did without the store."""

    how = ""


class Fallback:
    """Reads, and knows what to do where that fails. Threads may read at one time.

    After a failure, the store is left alone for ``silent_s``: a read that waits for it in vain would
    keep others waiting.

    Args:
        mode: ``error`` raises; ``missing`` finds nothing; ``stale`` finds what this reader read last
            of a key, if that is not too long ago, and nothing of others.
        views: How many views are read together.
        silent_s: For how long the store is not asked again.
        most: How many rows are kept of each view.
    """

    def __init__(self, mode: Mode, views: int, silent_s: float, most: int = MOST_KEPT) -> None:
        self._mode = mode
        self._silent_s = silent_s
        self._silent_until_s = 0.0
        self._most = most
        self._gone: ServerGoneError | None = None
        self._kept: list[OrderedDict[bytes, bytes]] = [OrderedDict() for _ in range(views)]
        self._last = _Last()

    @property
    def degraded(self) -> str:
        """What this thread's last read did: ``missing`` or ``stale``, nothing where it found rows."""
        return self._last.how

    @property
    def is_gone(self) -> bool:
        """Whether the store did not answer when it was last asked: to ask again may take long."""
        return self._gone is not None

    def read(self, keys: Encoded, fetch: Callable[[], Found]) -> Found:
        """Return the values of the keys of each view: what ``fetch`` returns, or what is done without.

        ``degraded`` then says which.

        Raises:
            ServerGoneError: ``fetch`` raised it, now or shortly before, and the mode is ``error``.
        """
        gone = self._gone
        if gone is not None and time.monotonic() < self._silent_until_s:
            return self._without(keys, gone)
        try:
            found = fetch()
        except ServerGoneError as error:
            self.miss(error)
            return self._without(keys, error)
        self._gone = None
        self._last.how = ""
        if self._mode == "stale":
            self._keep(keys, found)
        return found

    def miss(self, error: ServerGoneError) -> None:
        """Leave the store alone for a while; raise where nothing can be done without it."""
        # A copy has no traceback: what is kept and raised again would gather one frame each time.
        self._gone = copy.copy(error)
        self._silent_until_s = time.monotonic() + self._silent_s
        if self._mode == "error":
            raise error

    def _without(self, keys: Encoded, error: ServerGoneError) -> Found:
        if self._mode == "error":
            raise copy.copy(error)
        self._last.how = self._mode
        if self._mode == "missing":
            return [[None] * len(column) for column in keys]
        return [
            [None if key is None else kept.get(key) for key in column]
            for column, kept in zip(keys, self._kept, strict=True)
        ]

    def _keep(self, keys: Encoded, found: Found) -> None:
        for column, values, kept in zip(keys, found, self._kept, strict=True):
            for key, value in zip(column, values, strict=True):
                if key is not None:
                    # Each step is whole for other threads. A key without a row takes no place.
                    kept.pop(key, None)
                    if value is not None:
                        kept[key] = value
            while len(kept) > self._most:
                kept.popitem(last=False)
