"""Fixtures of the orchestration tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from orchestration.bench import Bench

from mlops_ray.metadata.home import Home


@pytest.fixture
def bench(ray_cluster: Any, tiny_project: Any, home: Home, tmp_path: Path) -> Bench:
    """A bench for running small workflows on a real Ray."""
    marks = tmp_path / "marks"
    marks.mkdir()
    return Bench(tiny_project, home, marks)
