"""Submitting through Ray's job API, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlops_ray.cluster.submission import submit
from mlops_ray.errors import ClusterError


def test_a_refusal_does_not_show_the_password_of_the_address(tmp_path: Path) -> None:
    address = "http://admin:hunter2@127.0.0.1:1"
    with pytest.raises(ClusterError) as caught:
        submit([], address=address, directory=tmp_path)
    assert "127.0.0.1:1" in str(caught.value)
    assert "hunter2" not in str(caught.value)
