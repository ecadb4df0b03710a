from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
import numpy as np
from mlops_ray.training.allocator import keep_freed_memory

def faults():
    for _ in range(3):
        np.ones(1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
print(before, faults())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so soon"
)
def test_memory_that_is_freed_is_used_again_without_page_faults() -> None:
    # A process of its own, in which nothing has told glibc how large allocations are.
    command = [sys.executable, "-c", _FAULTS]
    environment = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, after = map(int, told.stdout.split())
    assert before > 5_000
    assert after < 200
