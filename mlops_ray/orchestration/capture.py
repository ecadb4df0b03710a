"""Keeping what a step prints: by file descriptor, so that C code and subprocesses count too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mlops_ray.metadata.home import Home


def log_path(home: Home, run_id: str, step: str, item: int = -1) -> Path:
    """Return where the output of a step, or of one call of a mapped step, is kept."""
    folder = home.run(run_id) / "logs"
    return folder / f"{step}.log" if item < 0 else folder / step / f"{item}.log"


@contextlib.contextmanager
def captured(path: Path) -> Iterator[TextIO]:
    """Append to a file all that this process and its children write to stdout and stderr meanwhile.

    It is for processes that do one thing at a time: what other threads write goes there as well.
    Where nothing was written there is no file. Gives the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    with log, _redirected(log.fileno()):
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield log
        log.flush()
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[None]:
    kept = os.dup(1), os.dup(2)
    try:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(target, number)
        yield
    finally:
        # The C library keeps what C code has printed to itself, where it is not a terminal.
        ctypes.CDLL(None).fflush(None)
        for original, number in zip(kept, (1, 2), strict=True):
            os.dup2(original, number)
            os.close(original)
