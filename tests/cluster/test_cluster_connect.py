"""The environment that Ray reads, also where it was imported before us."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("first", ["import ray", "pass"])
def test_token_authentication_is_on_whether_or_not_ray_was_imported_before(first: str) -> None:
    lines = [
        first,
        "from mlops_ray.cluster.connect import prepare_environment",
        "prepare_environment()",
        "import ray._raylet",
        "print(ray._raylet.get_authentication_mode() == ray._raylet.AuthenticationMode.TOKEN)",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True", done.stderr
