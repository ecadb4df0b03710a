"""A workflow whose artifacts lie in a bucket: the same results, the same cache, MLflow sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from metadata.stores import address, start_server
from orchestration.bench import Bench

from mlops_ray.metadata import tracking
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.mirror import mirror


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server, endpoint = start_server()
    monkeypatch.setenv("MLOPS_RAY_ARTIFACTS", address(endpoint, "workflow"))
    yield endpoint
    server.stop()


STEPS: dict[str, Any] = {
    "numbers": {"uses": "orchestration.sample_steps.numbers", "with": {"count": 5}},
    "total": {
        "uses": "orchestration.sample_steps.total",
        "with": {"table": "$numbers"},
        "marks": True,
    },
    "folder": {"uses": "orchestration.sample_steps.folder", "with": {"total": "$total"}},
    "read": {
        "uses": "orchestration.sample_steps.read",
        "with": {"folder": "$folder", "extra": [1, 2]},
    },
}


def test_a_workflow_on_a_bucket(bucket: str, bench: Bench) -> None:
    home = bench.home = Home(bench.home.root)
    record, states, executor = bench.run(bench.project(**STEPS))
    assert set(states.values()) == {"succeeded"}
    assert executor.output(record.run_id, "read") == "1012"
    assert not home.artifacts.exists()
    _, states, _ = bench.run(bench.project(**STEPS))
    assert set(states.values()) == {"cached"}
    assert bench.count("total") == 1
    assert mirror(home) == 2
    client = tracking.connect(home)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    shown = client.search_runs([experiment], "tags.`mlops_ray.step` = 'total'")
    assert sorted(run.data.metrics["cache_hit"] for run in shown) == [0, 1]
    assert {run.data.params["table"].split()[0] for run in shown} == {"$numbers"}
    assert {run.inputs.dataset_inputs[0].dataset.name for run in shown} == {"numbers"}
