"""Steps that open spans of their own and print in every way there is."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys


def numbers(count: int) -> list[int]:
    return list(range(count))


def traced(value: int) -> int:
    from opentelemetry import trace

    with trace.get_tracer("user").start_as_current_span(f"inside {value}"):
        return value + 1


def fail_once(marks: str, values: list[int]) -> int:
    if not os.path.exists(f"{marks}/failed"):
        open(f"{marks}/failed", "x").close()
        raise ConnectionError("the first time it fails")
    return sum(values)


def prints() -> int:
    print("print")
    sys.stderr.write("stderr\n")
    logging.getLogger("mine").error("logging")
    os.write(2, b"descriptor\n")
    subprocess.run(["echo", "subprocess"], check=True)
    ctypes.CDLL(None).puts(b"C library")
    return 1
