"""A step's timeout, kept where the step runs: first it is interrupted, then its process ends."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

GRACE_S = 5.0
"""How long a step that was interrupted may take to end before its process is ended."""


class TimedOut(BaseException):
    """The step took longer than its timeout. Not an ``Exception``: steps are not meant to catch it."""


@contextlib.contextmanager
def limited(limit_s: float | None, log: TextIO) -> Iterator[None]:
    """Raise ``TimedOut`` in the block when it takes longer than ``limit_s``.

    A block that does not end within ``GRACE_S`` after that is ended with its process; where it stood
    is written to ``log``. It must be in the main thread. None: no limit.
    """
    if limit_s is None:
        yield
        return

    def strike(_number: int, _frame: Any) -> None:
        raise TimedOut(f"the step took longer than its timeout of {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, strike)
    # Written in C: it also ends a process whose Python does not get to run.
    faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=log)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def is_struck(log: Path, since: int) -> bool:
    """Say whether a step's process was ended by its deadline, from its log.

    Args:
        log: The step's log.
        since: How long it was, in bytes, before the step began.
    """
    try:
        with log.open("rb") as file:
            file.seek(since)
            return any(line.startswith(b"Timeout (") for line in file)
    except OSError:
        return False
