"""A queue in front of the ledger: writes that nobody waits for, committed many at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from mlops_ray.errors import LedgerError
from mlops_ray.metadata.records import Lease, Write

_MOST_AT_ONCE = 2000
_GATHER_S = 0.02
"""How long writes gather that nobody waits for: each commit takes the disk from the steps' outputs."""


class Journal:
    """Writes batches to the ledger in a thread of its own, in order, under a lease.

    Writes gather for a fiftieth of a second, or while a batch is being committed: many small changes
    cost one commit. A write counts as durable only after ``flush``, which does not wait for more. The
    first error stops the journal and is raised by every later call.

    Args:
        apply: ``Ledger.apply`` or what stands in for it: takes writes and ``fence``.
        fence: The lease under which to write; None writes unfenced.
    """

    def __init__(self, apply: Callable[..., Any], fence: Lease | None) -> None:
        self._apply = apply
        self._fence = fence
        self._changed = threading.Condition()
        self._waiting: list[Write] = []
        self._written = 0
        self._wanted = 0
        self._durable = 0
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def write(self, *writes: Write) -> None:
        """Queue writes.

        Raises:
            LeaseError: The lease was lost; likewise any other error of an earlier batch.
            LedgerError: The journal is closed.
        """
        with self._changed:
            self._raise()
            if self._closed:
                raise LedgerError("the journal is closed", fix="write before it is closed")
            self._waiting += writes
            self._written += len(writes)
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when everything that was written before is durable.

        Raises:
            LeaseError: The lease was lost; likewise any other error of a batch.
        """
        with self._changed:
            wanted = self._wanted = self._written
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._durable >= wanted)
            self._raise()

    def close(self) -> None:
        """Write what is queued and end the thread. Never raises; call ``flush`` first to know."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while batch := self._next():
            error = None
            try:
                self._apply(batch, fence=self._fence)
            except BaseException as raised:
                error = raised
            with self._changed:
                self._error = error
                self._durable += len(batch) if error is None else 0
                self._changed.notify_all()

    def _may_gather(self) -> bool:
        asked = self._closed or self._durable < self._wanted
        return not asked and len(self._waiting) < _MOST_AT_ONCE

    def _next(self) -> list[Write]:
        """Return the next batch; an empty one where there will be none."""
        with self._changed:
            if self._error is None:
                self._changed.wait_for(lambda: self._waiting or self._closed)
            until = time.monotonic() + _GATHER_S
            while self._may_gather() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._error is not None:
                return []
            batch = self._waiting[:_MOST_AT_ONCE]
            del self._waiting[:_MOST_AT_ONCE]
            return batch
