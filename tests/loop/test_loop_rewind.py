"""Back to before the first day: what is forgotten, what stays, and that no writer goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.push import ensure_writer, find_writer, push_events
from mlops_ray.loop.rewind import rewind
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.context import Context

PROJECT = "rewound"

FEATURES = Features.model_validate(
    {
        "sources": {"payments": {"push": {"till": "int", "amount": "float", "at": "timestamp"}}},
        "entities": {"till": {"keys": {"till": "int"}}},
        "views": {
            "newest": {
                "entity": "till",
                "source": "payments",
                "event_time": "at",
                "columns": {"amount": "float"},
            }
        },
        "services": {
            "pays": {
                "views": ["newest"],
                "inputs": {"till": {"dtype": "int"}, "at": {"dtype": "timestamp"}},
                "time": "at",
            }
        },
        "labels": {
            "source": "payments",
            "id": "till",
            "time": "at",
            "label": "amount",
            "known_at": "at",
        },
    }
)


def test_a_rewind_ends_the_writer_and_keeps_its_events(ray_cluster: Any, tmp_path: Path) -> None:
    home = Home(tmp_path)
    event = {"till": 1, "amount": 2.5, "at": "2024-01-01T00:00:00Z"}
    push_events(FEATURES, home, PROJECT, "payments", [event])
    ray_cluster.get(find_writer(PROJECT).commit.remote())
    offline = OfflineStore(home.offline(PROJECT), FEATURES)
    assert offline.read("newest")["amount"].to_pylist() == [2.5]
    push_events(FEATURES, home, PROJECT, "payments", [event | {"till": 2}])
    assert rewind(Context(PROJECT, home), PROJECT, FEATURES)
    with pytest.raises(FeatureStoreError, match="nothing takes in events"):
        find_writer(PROJECT)
    assert not home.offline(PROJECT).exists()
    assert not home.online(PROJECT).exists()
    assert not rewind(Context(PROJECT, home), PROJECT, FEATURES)
    try:
        ray_cluster.get(ensure_writer(FEATURES, home, PROJECT).commit.remote())
        assert sorted(offline.read("newest")["till"].to_pylist()) == [1, 2]
    finally:
        assert rewind(Context(PROJECT, home), PROJECT, FEATURES)
