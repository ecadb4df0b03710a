"""Faults of a deployed endpoint under load: what may fail is named, and nothing else does.

A replica that is killed takes with it the requests that it has accepted, and those that reach its
socket while the kernel takes the process down. Where another replica is left, that is all. Where none
is, those fail too that come before Serve has seen it; later ones wait for the next replica.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from faults import greedy
from faults.serving_load import load, parent, processes
from serving import shop
from serving.harness import Served, shared_serving

from mlops_ray.config.serving import Autoscaling, Placement, Routing
from mlops_ray.errors import ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Endpoint
from mlops_ray.serving.client.http import Client
from mlops_ray.serving.deployment.deploy import remove
from mlops_ray.serving.deployment.replicas import ask_all

DYING_S = 1.0
"""How long a killed process may hold on to its sockets, and a stand-in take to come."""

SEEN_S = 6.0
"""How long Serve may take to see that a replica is gone."""

ROW = {**shop.ROW, "shop": 1}


@pytest.fixture(scope="module")
def served(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The shop on two replicas: versions 1 and 2 are sound, 3 is greedy."""
    folder = tmp_path_factory.mktemp("faults")
    packages = [shop.write_package(folder / f"m{seed}", seed) for seed in (1, 2)]
    packages.append(shop.write_package(folder / "m3", 3, target="faults.greedy.Greedy"))
    home = Home(folder / "home")
    shop.fill_store(home, "shop")
    serving = shared_serving(autoscaling=Autoscaling(min_replicas=2, max_replicas=2))
    served = Served(home, serving, packages, Endpoint(name="shop", url="", versions={}))
    served.address = served.deploy(1)
    yield served
    remove("shop")


def replicas() -> list[int]:
    return sorted(replica["pid"] for replica in ask_all("shop", "describe", 10.0))


def kill(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def two_others(before: list[int]) -> bool:
    try:
        now = replicas()
    except Exception:
        return False
    return len(now) == 2 and now != before


def test_a_killed_replica_takes_only_what_it_had_accepted(served: Served) -> None:
    before = replicas()
    with load(served.address, ROW) as seen:
        time.sleep(1)
        killed_s = seen.now_s()
        kill(before[:1])
        wait_until(lambda: two_others(before))
        time.sleep(1)
    assert seen.failed_outside(killed_s - 0.1, killed_s + DYING_S) == []
    assert len(seen.failed) < 32
    assert len(seen.answered) > 200


def test_without_a_replica_requests_wait_for_the_next(served: Served) -> None:
    before = replicas()
    with load(served.address, ROW, 20) as seen:
        time.sleep(1)
        killed_s = seen.now_s()
        kill(before)
        wait_until(lambda: two_others(before))
    assert [one for one in seen.failed if one[0] > killed_s + SEEN_S or one[1] < killed_s] == []
    assert max(sent_s for sent_s, _, _ in seen.answered) > killed_s + SEEN_S


def test_a_killed_proxy_is_stood_in_for(served: Served) -> None:
    with load(served.address, ROW) as seen:
        time.sleep(1)
        before, killed_s = proxies(), seen.now_s()
        kill(before)
        # Ray sees it after some seconds, and starts the next one.
        wait_until(lambda: bool(set(proxies()) - set(before)))
        time.sleep(1)
    assert seen.failed_outside(killed_s - 0.1, killed_s + DYING_S) == []
    assert len(seen.answered) > 300


def proxies() -> list[int]:
    """The HAProxies that Ray runs itself, not a stand-in."""
    managers = processes("ray::HAProxyManager")
    return [pid for pid in processes("haproxy") if parent(pid) in managers]


def test_a_killed_controller_is_not_noticed(served: Served) -> None:
    with load(served.address, ROW) as seen:
        time.sleep(1)
        before = processes("ray::ServeController")
        kill(before)
        wait_until(
            lambda: bool(set(processes("ray::ServeController")) - set(before)) and bool(replicas())
        )
        time.sleep(1)
    assert seen.failed == []
    served.deploy(2)
    served.deploy(1)


def test_a_process_that_hears_of_no_changes_still_deploys(served: Served) -> None:
    """What Serve does to a process of which it believes that the controller is gone for good."""
    from ray.serve._private.long_poll import LongPollClient
    from ray.serve._private.router import SharedRouterLongPollClient

    served.deploy(1)
    before = replicas()
    listening = [one for one in gc.get_objects() if isinstance(one, LongPollClient)]
    assert listening
    for one in listening:
        one.stop()
    try:
        served.serving = served.serving.model_copy(update={"threshold": 0.3})
        served.deploy(2)
        assert not set(replicas()) & set(before)
    finally:
        SharedRouterLongPollClient.get_or_create.cache_clear()


def test_a_model_in_another_process_is_found_again_when_controller_and_process_have_died(
    served: Served,
) -> None:
    before = served.serving
    alone = Routing(shares={"first": 0.5}, placement={"first": Placement(num_cpus=0.1)})
    served.serving = before.model_copy(update={"routing": alone})
    try:
        served.deploy(1, 2)
        for _ in range(2):
            kill(processes("ray::ServeController"))
            kill(processes("ray::ServeReplica:shop:model-first"))
            with closing(Client(served.address, retries=None)) as client:
                wait_until(lambda client=client: answering(client) == {1, 2})
    finally:
        served.serving = before
        served.deploy(1)


def answering(client: Client) -> set[int | None]:
    """The versions that answer some requests, None among them where one fails."""
    found: set[int | None] = set()
    for _ in range(20):
        try:
            found.add(client.predict([ROW]).version)
        except ServingError:
            found.add(None)
    return found


def test_a_model_whose_file_is_missing_leaves_the_old_one(served: Served, tmp_path: Path) -> None:
    served.deploy(1)
    kept = served.packages[1]
    gone = tmp_path / "gone"
    shutil.copytree(kept, gone)
    (gone / "weights.safetensors").unlink()
    served.packages[1] = gone
    try:
        with load(served.address, ROW) as seen:
            time.sleep(0.5)
            with pytest.raises(ServingError, match="goes on with the old"):
                served.deploy(2)
            time.sleep(0.5)
    finally:
        served.packages[1] = kept
    assert seen.failed == []
    assert {version for _, _, version in seen.answered} == {1}


def test_a_model_that_takes_all_memory_fails_alone(served: Served) -> None:
    served.deploy(3)
    before = replicas()
    client = Client(served.address, retries=None)
    try:
        with load(served.address, ROW) as seen:
            for _ in range(5):
                with pytest.raises(ServingError, match="500"):
                    client.predict([ROW] * greedy.ROWS)
    finally:
        client.close()
        served.deploy(1)
    assert seen.failed == []
    assert replicas() == before


def test_swaps_and_new_code_under_load_lose_nothing(served: Served) -> None:
    served.deploy(1)
    before = replicas()
    with load(served.address, ROW) as seen:
        for version in (2, 1, 2):
            served.deploy(version)
            assert replicas() == before
        served.serving = served.serving.model_copy(update={"threshold": 0.4})
        served.deploy(1)
        assert not set(replicas()) & set(before)
        time.sleep(1)
    assert seen.failed == []
    assert {version for _, _, version in seen.answered} == {1, 2}
