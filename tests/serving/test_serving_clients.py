"""Public clients of the Open Inference Protocol, and our own, against a real Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from serving import shop
from serving.harness import Served, free_port, same
from serving.test_serving_grpc_content import inputs
from tritonclient.utils import InferenceServerException

from mlops_ray import AsyncClient, Client, Hedging
from mlops_ray.config.serving import Grpc, Serving
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Endpoint as Address

ROWS = [
    shop.ROW | {"coupon": "spring", "shop": 0, "amount": 0.0},
    shop.ROW | {"coupon": "spring", "shop": 1, "amount": 1.0, "customer": "bert"},
]


@pytest.fixture(scope="module")
def opened(ray_cluster: Any, shop_home: Home, packages: list[Path]) -> Iterator[Served]:
    """The shop with both doors. Serve has gRPC from its start or not at all."""
    from ray import serve

    from mlops_ray.serving.deployment.deploy import remove
    from mlops_ray.serving.deployment.runtime import describe

    found = describe()
    if found is not None and not found.grpc_port:
        serve.shutdown()
        found = None
    serving = Serving(
        port=found.port if found else free_port(),
        grpc=Grpc(enabled=True, port=found.grpc_port if found else free_port()),
        max_body_bytes=200_000,
    )
    served = Served(shop_home, serving, packages, Address(name="shop", url="", versions={}))
    served.address = served.deploy(1, 1)
    yield served
    remove("shop")


@pytest.fixture(scope="module")
def expected(opened: Served) -> list[float]:
    with Client(opened.address) as client:
        return client.predict(ROWS).scores


def test_triton_over_grpc(opened: Served, expected: list[float]) -> None:
    with over_grpc.InferenceServerClient(f"127.0.0.1:{opened.serving.grpc.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("shop")
        assert not client.is_model_ready("shoe")
        described = client.get_model_metadata("shop", as_json=True)
        assert [tensor["name"] for tensor in described["inputs"]] == list(shop.ROW)
        result = client.infer("shop", inputs(), request_id="r1")
        assert same(result.as_numpy("score"), expected)
        assert result.as_numpy("version").tolist() == [1, 1]
        assert result.get_response().id == "r1"


def test_refusals_over_grpc(opened: Served) -> None:
    with over_grpc.InferenceServerClient(f"127.0.0.1:{opened.serving.grpc.port}") as client:
        for call, status, details in (
            (("shoe", inputs()), "NOT_FOUND", "shoe"),
            (("shop", inputs()[1:]), "INVALID_ARGUMENT", "customer is missing"),
            (("shop", inputs(), "7"), "NOT_FOUND", "version 7"),
            (("shop", inputs(1024 * 8)), "INVALID_ARGUMENT", "200000 are allowed"),
        ):
            with pytest.raises(InferenceServerException) as caught:
                client.infer(*call)
            assert caught.value.status() == f"StatusCode.{status}"
            assert details in caught.value.message()
        assert len(client.infer("shop", inputs()).as_numpy("id")) == 2


@pytest.mark.parametrize("binary", [True, False])
def test_triton_over_http(opened: Served, expected: list[float], binary: bool) -> None:
    columns = {name: [row[name] for row in ROWS] for name in shop.ROW}
    columns["at"] = [shop.NOW_US] * 2
    given = []
    for tensor in inputs():
        values = np.array(columns[tensor.name()])
        values = values.astype(object) if tensor.datatype() == "BYTES" else values
        made = over_http.InferInput(tensor.name(), [2], tensor.datatype())
        given.append(made.set_data_from_numpy(values, binary_data=binary))
    with over_http.InferenceServerClient(f"127.0.0.1:{opened.serving.port}") as client:
        assert client.is_server_ready()
        assert client.is_model_ready("shop")
        result = client.infer("shop", given)
        assert same(result.as_numpy("score"), expected)
        assert result.as_numpy("version").tolist() == [1, 1]


def test_our_clients_agree(opened: Served, expected: list[float]) -> None:
    columns = {name: [row[name] for row in ROWS] for name in shop.ROW}

    async def ask() -> list[float]:
        async with AsyncClient(opened.address, hedging=Hedging(after_s=0.001)) as client:
            assert await client.ready()
            answers = await asyncio.gather(*(client.predict(ROWS) for _ in range(50)))
            assert {tuple(answer.routes) for answer in answers} == {("champion", "champion")}
            return answers[-1].scores

    with Client(f"{opened.address.url}/v1/models/shop", hedging=Hedging(after_s=0.001)) as client:
        assert client.ready()
        assert same(client.predict(columns=columns).scores, expected)
        for _ in range(50):
            assert same(client.predict(ROWS).scores, expected)
        answer = client.predict(table=pa.table(columns))
        assert same(answer.scores, expected)
        assert (answer.version, answer.routes) == (1, ["champion"] * 2)
        assert client.metadata()["model"] == "shop"
        explained = client.explain(ROWS)
        assert same(explained.scores, expected)
    assert same(asyncio.run(ask()), expected)
