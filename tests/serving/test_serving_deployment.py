"""The endpoint on a real cluster: HTTP as a client sees it, changes under load, other applications."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from serving import shop
from serving.harness import Served, same

from mlops_ray.errors import RequestError, ServingError
from mlops_ray.metadata.prediction_log.news import read_news
from mlops_ray.metadata.prediction_log.reading import read_labels, read_predictions
from mlops_ray.serving.client.http import AsyncClient, Client
from mlops_ray.serving.deployment import deploy as deployment
from mlops_ray.serving.deployment import runtime
from mlops_ray.serving.deployment.applications import deployed, details

PREDICT = "/v1/models/shop/predict"


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    client = Client(served.address)
    yield client
    client.close()


def send(served: Served, body: bytes | Iterator[bytes], path: str = PREDICT) -> tuple[int, Any]:
    request = urllib.request.Request(served.address.url + path, data=body, method="POST")
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ids_on_disk(served: Served, kind: str = "predictions") -> list[str]:
    read = read_labels if kind == "labels" else read_predictions
    return read(served.home.predictions("shop"))["id"].to_pylist()


def test_serve_runs_in_throughput_mode(served: Served, client: Client) -> None:
    assert runtime.running() == (served.serving.port, "throughput")
    assert client.metadata()["mode"] == "throughput"


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"rows": [{**shop.ROW, "amuont": 1}]}, 422, "amuont"),
        ({"rows": [{k: v for k, v in shop.ROW.items() if k != "shop"}]}, 422, "shop"),
        ({"rows": [{**shop.ROW, "weather": "fine"}]}, 422, "weather"),
        ({"rows": [shop.ROW, {**shop.ROW, "amount": float("nan")}]}, 422, "amount"),
        ({"rows": [{**shop.ROW, "shop": "seven"}]}, 422, "shop"),
        ({"rows": [shop.ROW] * 1025}, 413, "rows"),
        ("no rows", 422, None),
    ],
)
def test_bad_request_is_refused_by_field(
    served: Served, client: Client, body: Any, status: int, field: str | None
) -> None:
    found, content = send(served, json.dumps(body).encode())
    assert found == status
    assert content["error"]["field"] == field
    assert content["error"]["message"]
    assert len(client.predict([shop.ROW]).scores) == 1


def test_broken_json_and_unknown_paths(served: Served) -> None:
    assert send(served, b'{"rows": [')[0] == 400
    status, content = send(served, b"{}", "/v1/models/shop/predictt")
    assert status == 404
    assert "did you mean" in content["error"]["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_body_of_50_mb_is_refused_and_the_endpoint_stays_up(
    served: Served, client: Client, announced: bool
) -> None:
    replica = client.metadata()["replica"]
    piece = b" " * 1_000_000
    status, content = send(served, piece * 50 if announced else iter([piece] * 50))
    assert status == 413
    assert "200000" in content["error"]["message"]
    assert client.predict([shop.ROW]).version
    assert client.metadata()["replica"] == replica


def test_client_raises_what_the_endpoint_says(client: Client) -> None:
    with pytest.raises(RequestError) as caught:
        client.predict([shop.ROW, {**shop.ROW, "amount": -1}])
    assert (caught.value.status, caught.value.field, caught.value.row) == (422, "amount", 1)


def test_feedback_may_be_told_again(served: Served, client: Client) -> None:
    label = {"id": "told-again", "label": 1, "known_at": shop.NOW}
    assert client.feedback([label]) == client.feedback([label]) == 1
    deployment.flush(served.address)
    assert ids_on_disk(served, "labels").count("told-again") in (1, 2)


def test_every_answered_row_is_on_disk_after_a_flush(served: Served) -> None:
    ids = [f"row-{number}" for number in range(600)]

    async def ask() -> None:
        async with AsyncClient(served.address) as client:

            async def work(start: int) -> None:
                for first in range(start, len(ids), 24):
                    chosen = ids[first : first + 3]
                    answer = await client.predict([shop.ROW] * len(chosen), ids=chosen)
                    assert answer.ids == chosen

            await asyncio.gather(*(work(start) for start in range(0, 24, 3)))
            await client.predict([shop.ROW], ids=["not-logged"], log=False)

    asyncio.run(ask())
    deployment.flush(served.address)
    written = ids_on_disk(served)
    assert sorted(name for name in written if name.startswith("row-")) == sorted(ids)
    assert "not-logged" not in written


def test_replicas_say_what_the_endpoint_serves(served: Served, client: Client) -> None:
    found, told = deployment.describe(served.address), client.metadata()
    for name in ("answer", "versions", "epoch"):
        assert found[name] == told[name]
    assert found["packages"].keys() == found["versions"].keys()


def test_deploying_the_same_again_changes_nothing(served: Served, client: Client) -> None:
    served.deploy(1, 1)
    before = client.metadata()
    served.deploy(1, 1)
    after = client.metadata()
    assert (after["epoch"], after["replica"]) == (before["epoch"], before["replica"])


def test_swaps_under_load_lose_nothing(served: Served, client: Client) -> None:
    replica = client.metadata()["replica"]
    stop = threading.Event()
    seen: list[tuple[int, float]] = []
    failures: list[BaseException] = []

    async def load() -> None:
        async with AsyncClient(served.address) as many:

            async def work() -> None:
                while not stop.is_set():
                    try:
                        answer = await many.predict([shop.ROW])
                    except Exception as error:
                        failures.append(error)
                    else:
                        seen.append((answer.version, answer.scores[0]))

            await asyncio.gather(*(work() for _ in range(4)))

    thread = threading.Thread(target=asyncio.run, args=(load(),))
    thread.start()
    try:
        for version in (2, 3, 1, 2):
            served.deploy(version, 1)
            assert client.predict([shop.ROW]).version == version
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert {version for version, _ in seen} == {1, 2, 3}
    for version in (1, 2, 3):
        scores = [score for found, score in seen if found == version]
        assert same(scores, scores[0])
    assert client.metadata()["replica"] == replica


def test_broken_package_is_reported_and_the_old_one_goes_on(served: Served, client: Client) -> None:
    served.deploy(2, 1)
    with pytest.raises(ServingError, match="goes on with the old") as caught:
        served.deploy(4, 1)
    assert "version 4 (champion)" in str(caught.value)
    assert client.predict([shop.ROW]).version == 2
    served.deploy(3, 1)
    assert client.predict([shop.ROW]).version == 3


def test_first_deployment_of_a_broken_package_fails(served: Served) -> None:
    shop.fill_store(served.home, "shop_broken")
    with pytest.raises(ServingError, match="cannot be deployed") as caught:
        served.deploy(4, project="shop_broken")
    assert "version 4 (champion) cannot be served" in caught.value.why
    assert "Traceback" not in str(caught.value)
    assert deployment.remove("shop_broken")


def test_other_applications_stay(served: Served, client: Client) -> None:
    shop.fill_store(served.home, "shop_two")
    other = served.deploy(2, project="shop_two")
    try:
        served.deploy(1, 2)
        second = Client(other)
        assert second.predict([shop.ROW]).version == 2
        assert second.metadata()["model"] == "shop_two"
        assert client.predict([shop.ROW]).version == 1
    finally:
        assert deployment.remove("shop_two")
    assert not deployment.remove("shop_two")
    assert client.predict([shop.ROW]).version == 1
    with pytest.raises(RequestError) as caught:
        second.predict([shop.ROW])
    assert caught.value.status == 404


def test_monitor_reads_each_row_once(served: Served, client: Client) -> None:
    log = served.home.predictions("shop")
    deployment.flush(served.address)
    positions: dict[str, int] = {}
    while (news := read_news(log, positions)) is not None:
        positions |= news.positions
    for number in range(5):
        client.predict([shop.ROW] * 2, ids=[f"watched-{number}-{row}" for row in range(2)])
    deployment.flush(served.address)
    news = read_news(log, positions)
    assert news is not None
    days = [profile for buckets in news.buckets.values() for profile in buckets.values()]
    assert news.predictions.num_rows == sum(profile.rows for profile in days) == 10
    assert all(name.startswith("watched-") for name in news.predictions["id"].to_pylist())
    assert read_news(log, positions | news.positions) is None


def test_other_port_is_refused(served: Served) -> None:
    wrong = served.serving.model_copy(update={"port": served.serving.port + 1})
    with pytest.raises(ServingError, match=f"on port {served.serving.port}"):
        runtime.start(wrong)


def test_replica_that_dies_comes_back_with_its_models(
    ray_cluster: Any, served: Served, client: Client
) -> None:
    served.deploy(1, 2)
    before = deployed(details(), "shop")
    served.deploy(2, 1)
    # Serve would send requests by its slow proxy while it hands a change over.
    assert deployed(details(), "shop") == before
    replica = client.metadata()["replica"]
    (actor,) = [
        name
        for name in ray_cluster.util.list_named_actors(all_namespaces=True)
        if name["name"].endswith(replica)
    ]
    ray_cluster.kill(ray_cluster.get_actor(actor["name"], namespace=actor["namespace"]))
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            found = client.metadata()
        except (ServingError, RequestError):
            found = {"replica": replica}
        if found["replica"] != replica:
            break
        time.sleep(0.2)
    assert found["versions"] == {"champion": 2, "first": 1}
    assert client.predict([shop.ROW]).version == 2
