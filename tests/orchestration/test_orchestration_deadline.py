"""What a step's log says of its deadline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlops_ray.orchestration import deadline

STUBBORN = """
import sys, time
from mlops_ray.orchestration import deadline
deadline.GRACE_S = 0.1
with open(sys.argv[1], "a") as log, deadline.limited(0.1, log):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


def test_the_log_says_whether_the_deadline_has_ended_a_process(tmp_path: Path) -> None:
    log = tmp_path / "step.log"
    assert not deadline.is_struck(log, 0)
    log.write_text("working\n")
    before = log.stat().st_size
    assert not deadline.is_struck(log, 0)
    ended = subprocess.run([sys.executable, "-c", STUBBORN, str(log)], check=False)
    assert ended.returncode == 1
    assert deadline.is_struck(log, before)
    # The next try died of something else.
    assert not deadline.is_struck(log, log.stat().st_size)
