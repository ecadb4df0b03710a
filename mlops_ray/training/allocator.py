"""How the C library of a process deals with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""What ``mallopt`` of glibc calls the two settings."""

_KEPT_BYTES = 256 << 20
_MAPPED_BYTES = 32 << 20


def keep_freed_memory() -> None:
    """Have this process keep some memory that is freed for what is asked for next.

    Activations of a batch are a few MiB. By default glibc may return each of them to the kernel, and
    a small model then waits for fresh pages longer than it computes. Does nothing on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
