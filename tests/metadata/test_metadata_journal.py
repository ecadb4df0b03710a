"""The journal: in order, many at a time, and an error ends it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from mlops_ray.errors import LeaseError, LedgerError
from mlops_ray.metadata.journal import Journal
from mlops_ray.metadata.records import Lease, NewEvent, Write


def event(number: int) -> NewEvent:
    return NewEvent(project="p", kind="k", data={"n": number})


class Gate:
    """An ``apply`` that commits nothing until it is let through."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.fences: list[Lease | None] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Semaphore(0)
        self.error: Exception | None = None

    def apply(self, writes: Sequence[Write], *, fence: Lease | None) -> None:
        self.entered.release()
        self.open.acquire()
        if self.error is not None:
            raise self.error
        self.batches.append([write.data["n"] for write in writes if isinstance(write, NewEvent)])
        self.fences.append(fence)


def test_what_comes_while_a_batch_is_committed_becomes_the_next_batch(lease: Lease) -> None:
    gate = Gate()
    journal = Journal(gate.apply, lease)
    journal.write(event(0))
    gate.entered.acquire()
    journal.write(event(1), event(2))
    journal.write(event(3))
    gate.open.release(2)
    journal.flush()
    assert gate.batches == [[0], [1, 2, 3]]
    assert gate.fences == [lease, lease]
    journal.close()


def test_flush_waits_for_what_was_written_before_and_for_no_more() -> None:
    gate = Gate()
    journal = Journal(gate.apply, None)
    journal.write(event(0))
    gate.entered.acquire()
    flushed = threading.Event()

    def flush() -> None:
        journal.flush()
        flushed.set()

    threading.Thread(target=flush).start()
    assert not flushed.wait(0.05)
    journal.write(event(1))
    gate.open.release()
    gate.entered.acquire()
    # The second batch has begun and cannot end: the flush must not depend on it.
    assert flushed.wait(20)
    gate.open.release()
    journal.close()
    assert gate.batches == [[0], [1]]


def test_the_first_error_ends_it_and_is_raised_by_every_later_call() -> None:
    gate = Gate()
    journal = Journal(gate.apply, None)
    journal.write(event(0))
    gate.error = LeaseError("lost")
    gate.open.release(5)
    for call in (journal.flush, journal.flush, lambda: journal.write(event(1))):
        with pytest.raises(LeaseError, match="lost"):
            call()
    journal.close()
    assert gate.batches == []


def test_close_writes_what_is_queued() -> None:
    written: list[Any] = []
    journal = Journal(lambda writes, fence: written.extend(writes), None)
    journal.write(*(event(number) for number in range(5000)))
    journal.close()
    assert [write.data["n"] for write in written] == list(range(5000))


def test_nothing_is_taken_that_would_not_be_written() -> None:
    journal = Journal(lambda writes, fence: None, None)
    journal.write(event(0))
    journal.close()
    journal.flush()
    with pytest.raises(LedgerError, match="closed"):
        journal.write(event(1))
    journal.flush()


@pytest.fixture
def lease() -> Lease:
    return Lease(name="w", owner="me", token=1, expires_at="2026-01-01")
