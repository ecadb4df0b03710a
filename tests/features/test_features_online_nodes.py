from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from features.online_nodes import PROJECT, commit, declared
from features.online_samples import declare, get, keys, put, row, table

from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import NOT_FOUND, open_online
from mlops_ray.features.online.nodes import NodeCopy, ensure_copy, open_near
from mlops_ray.metadata.home import Home


def test_without_copies_the_store_itself_is_read(tmp_path: Path) -> None:
    home, features = Home(tmp_path), declare()
    put(open_online(features, home.online("p"), "p"), features, row(1))
    assert get(open_near(features, home, "p"), 10)[0]["price"] == 1.5


def test_a_copy_is_filled_before_it_is_read_and_then_follows(
    ray_cluster: Any, tmp_path: Path
) -> None:
    home, features = Home(tmp_path / "home"), declared(tmp_path / "disk")
    offline = OfflineStore(home.offline(PROJECT), features)
    commit(offline, features, 1, 1.0)
    store = open_near(features, home, PROJECT)
    actor = ensure_copy(features, home, PROJECT)
    try:
        asked = [keys(("north", 1))]
        reader = store.reader(["thing"])
        assert reader.read(asked, np.array([100]))[0][0, 0] == 1.0
        assert not home.online(PROJECT).exists()
        for moment, price in ((2, 2.0), (3, 3.0)):
            commit(offline, features, moment, price)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                if reader.read(asked, np.array([100]))[0][0, 0] == price:
                    break
                time.sleep(0.05)
            assert reader.read(asked, np.array([100]))[0][0, 0] == price
            # A restart goes on from what is there.
            ray_cluster.kill(actor, no_restart=False)
        added = features.views["thing"].model_copy(update={"version": 2})
        newer = features.model_copy(update={"views": features.views | {"thing": added}})
        fresh = open_near(newer, home, PROJECT)
        assert get(fresh, 100)[1] == [NOT_FOUND] * 6
        commit(OfflineStore(home.offline(PROJECT), newer), newer, 4, 4.0)
        assert get(open_near(newer, home, PROJECT), 100)[0]["price"] == 4.0
    finally:
        ray_cluster.kill(actor)


def test_a_copy_outlives_any_error_and_takes_the_other_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    features = declare(copies=str(tmp_path / "disk"), copy_every="1h")
    offline = OfflineStore(home.offline(PROJECT), features)
    copy = NodeCopy(features, str(home.root), PROJECT)
    copy.follow(features)
    failing = ["thing"]

    def flaky(offline: Any, online: Any, view: str) -> int:
        if view in failing:
            raise OSError("stale file handle")
        return materialize_view(offline, online, view)

    monkeypatch.setattr("mlops_ray.features.online.nodes.materialize_view", flaky)
    commit(offline, features, 1, 1.0)
    plain = table(features, "plain", [{"shelf": 1, "event_time": 1, "created_time": 1, "a": 7.0}])
    offline.append("plain", plain, 1, "code")
    copy.keep_up()
    store = open_online(features, tmp_path / "disk" / PROJECT, PROJECT, readonly=True)
    assert store.read_matrix("plain", [np.array([1])], np.array([9]))[0][0, 0] == 7.0
    assert get(store, 9)[1] == [NOT_FOUND] * 6
    failing.clear()
    copy.keep_up()
    assert get(store, 9)[0]["price"] == 1.0
