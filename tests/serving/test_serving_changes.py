"""Changes of an endpoint that runs: shares, scaling, processes of its own; and the list of all."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from click.testing import CliRunner
from faults.serving_load import load
from serving import shop
from serving.harness import Served, same

from mlops_ray.cli.endpoints import endpoints as endpoints_verb
from mlops_ray.config.serving import Autoscaling, Placement, Routing, Serving
from mlops_ray.errors import ServingError
from mlops_ray.serving.client.http import Client
from mlops_ray.serving.deployment import applications, deploy
from mlops_ray.serving.deployment.deploy import remove
from mlops_ray.serving.deployment.replicas import ask_all
from mlops_ray.serving.models.changes import Change, Changes
from mlops_ray.serving.models.served import ServedModels


@pytest.fixture(autouse=True)
def unchanged(served: Served) -> Iterator[Serving]:
    """The serving that the module began with; each test leaves it."""
    before = served.serving
    yield before
    served.serving = before


def change(served: Served, *versions: int, **changes: Any) -> None:
    served.serving = served.serving.model_copy(update=changes)
    served.deploy(*versions)


def pids() -> list[int]:
    return sorted(replica["pid"] for replica in ask_all("shop", "describe", 10.0))


def test_shares_change_in_place_under_load(served: Served) -> None:
    served.deploy(1, 2)
    before = pids()
    with load(served.address, shop.ROW) as seen:
        marks = []
        for share in (0.5, 1.0, 0.0):
            shares = {"first": share} if share else {}
            change(served, 1, 2, routing=Routing(shares=shares))
            start_s = seen.now_s()
            time.sleep(1)
            marks.append((start_s, seen.now_s()))
        assert pids() == before
    assert seen.failed == []
    found = [[v for sent_s, _, v in seen.answered if a < sent_s < b] for a, b in marks]
    assert set(found[0]) == {1, 2}
    assert set(found[1]) == {2}
    assert set(found[2]) == {1}


def declared(served: Served) -> ServedModels:
    application = applications.deployed(applications.details(), "shop")
    assert application is not None
    return ServedModels.parse(application["deployments"][0]["user_config"])


def test_a_change_that_does_not_come_to_its_end_is_taken_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.deploy(1, 2)
    served.deploy(2, 1)
    changes = Changes(served.home, "shop")
    before = changes.read(declared(served))
    assert before is not None
    assert before.before is None

    def late(*_: Any) -> None:
        raise ServingError("it is not ready in time")

    with monkeypatch.context() as patch:
        patch.setattr(deploy, "wait_until_served", late)
        with pytest.raises(ServingError, match="in time"):
            served.deploy(3, 1)
    assert changes.read(declared(served)) == before
    assert {replica["epoch"] for replica in ask_all("shop", "describe", 10.0)} == {
        before.served.epoch
    }


def test_a_change_whose_process_was_killed_is_begun_anew(served: Served) -> None:
    served.deploy(1, 2)
    served.deploy(2, 1)
    changes = Changes(served.home, "shop")
    standing = changes.read(declared(served))
    assert standing is not None
    left = standing.served.model_copy(update={"epoch": standing.served.epoch + 1})
    changes.keep(declared(served), Change(served=left, before=standing.served))
    served.deploy(2, 1)
    found = changes.read(declared(served))
    assert found is not None
    assert found.before is None
    assert found.served.epoch > left.epoch
    assert {replica["epoch"] for replica in ask_all("shop", "describe", 10.0)} == {
        found.served.epoch
    }


def test_an_alias_has_processes_of_its_own(served: Served) -> None:
    expected = {}
    for version in (1, 2, 3):
        served.deploy(version)
        client = Client(served.address)
        expected[version] = client.predict([shop.ROW]).scores
        client.close()
    placement = {"first": Placement(num_cpus=0.1)}
    change(served, 1, 2, routing=Routing(shares={"first": 0.5}, placement=placement))
    deployments = applications.details()["applications"]["shop"]["deployments"]
    assert set(deployments) == {"endpoint", "model-first"}
    (own,) = deployments["model-first"]["replicas"]
    assert own["pid"] not in pids()
    client = Client(served.address)
    for versions in ((1, 2), (1, 3)):
        served.deploy(*versions)
        answers = [client.predict([shop.ROW]) for _ in range(40)]
        assert {answer.version for answer in answers} == set(versions)
        for answer in answers:
            assert same(answer.scores, expected[answer.version])
    client.close()
    change(served, 1, 2, routing=Routing(placement=placement))
    client = Client(served.address)
    assert {client.predict([shop.ROW]).version for _ in range(10)} == {1}
    client.close()


def test_an_endpoint_scales_to_none_and_back(served: Served) -> None:
    scaling = Autoscaling(min_replicas=0, max_replicas=2, upscale_delay="1s", downscale_delay="1s")
    change(served, 1, autoscaling=scaling)

    def running() -> int:
        state = applications.details()["applications"]["shop"]["deployments"]["endpoint"]
        return len(state["replicas"])

    deadline_s = time.monotonic() + 60
    while running() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert running() == 0
    with pytest.raises(ServingError, match="goes on with the old"):
        served.deploy(4)
    client = Client(served.address, retries=None, timeout_s=60)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.predict, [shop.ROW]) for _ in range(8)]
        assert {future.result().version for future in asked} == {1}
    client.close()
    # Scaled to none once more or not: a changed model is tried before the deployment returns.
    served.deploy(2)


def test_all_endpoints_are_listed_and_one_is_removed(served: Served) -> None:
    change(served, 1, 2, routing=Routing(shares={"first": 0.1}))
    shop.fill_store(served.home, "shop_two")
    other = served.deploy(2, project="shop_two")
    served.deploy(3, project="shop_two")
    runner = CliRunner()
    listed = json.loads(runner.invoke(endpoints_verb, ["--json"]).output)
    first, second = listed
    assert first["shares"] == {"champion": 0.9, "first": 0.1}
    assert (second["name"], second["versions"]) == ("shop_two", {"champion": 3})
    assert second["replicas"] == {"endpoint": 1}
    assert "first 2: 0.1" in runner.invoke(endpoints_verb, []).output
    for name in ("shop", "shop_two"):
        url = f"{other.url}/v2/models/{name}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert json.load(answer)["name"] == name
    assert "shop_two is down" in runner.invoke(endpoints_verb, ["remove", "shop_two"]).output
    assert [*(served.home.root / "serving" / "shop_two").iterdir()] == []
    again = runner.invoke(endpoints_verb, ["remove", "shop_two"])
    assert again.exit_code != 0
    assert "there is no endpoint" in str(again.exception)
    assert not remove("shop_two")
