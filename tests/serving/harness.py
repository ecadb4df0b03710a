"""The shop behind an endpoint: one in this process, and one on a real cluster."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from serving import shop

from mlops_ray.config.serving import Grpc, Serving
from mlops_ray.features.lookup import OnlineLookup
from mlops_ray.features.online import open_online
from mlops_ray.features.service import feature_columns
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Endpoint as Address
from mlops_ray.serving.endpoint.endpoint import Endpoint
from mlops_ray.serving.models.loading import ModelLoader
from mlops_ray.serving.models.served import ModelSpec


@dataclass
class LocalShop:
    """An endpoint that is called as an ASGI application."""

    home: Home
    endpoint: Endpoint
    packages: list[Path]

    def config(self, answer: int, *shadows: int, epoch: int | None = None) -> dict[str, Any]:
        """The user config that serves these versions, all but the first in shadow."""
        names = ["champion", "first", "second"]
        specs = [
            {"alias": alias, "version": version, "path": str(self.packages[version - 1])}
            for alias, version in zip(names, (answer, *shadows), strict=False)
        ]
        return {"answer": specs[0], "shadows": specs[1:], "epoch": epoch or answer}

    async def call(
        self, method: str, path: str, body: Any = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Send a request as a server would; return status and JSON content."""
        status, _, content = await self.send(method, path, body, headers)
        return status, json.loads(content)

    async def send(
        self, method: str, path: str, body: Any = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request as a server would; return status, headers and body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-length": str(len(data)), **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
        pieces = [data[i : i + 65_536] for i in range(0, len(data), 65_536)] or [b""]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.endpoint(scope, receive, send)
        answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answered, sent[1]["body"]

    async def predict(self, rows: list[dict[str, Any]], **more: Any) -> Any:
        """Predict; the request must succeed."""
        status, content = await self.call("POST", "/v1/models/shop/predict", {"rows": rows, **more})
        assert status == 200, content
        return content


def open_local(
    store_home: Home, packages: list[Path], home: Home, serving: Serving, **more: Any
) -> LocalShop:
    features = shop.features()
    store = open_online(features, store_home.online("shop"), "shop", readonly=True)
    endpoint = Endpoint(
        "shop",
        home,
        serving,
        features,
        "buys",
        lookup=OnlineLookup(features, "buys", store),
        loader=ModelLoader(*feature_columns(features, "buys"), graph=serving.graph),
        replica="r1",
        **more,
    )
    return LocalShop(home, endpoint, packages)


@dataclass
class Served:
    """The shop on a real cluster. ``deploy`` serves versions of ``packages``, first answering."""

    home: Home
    serving: Serving
    packages: list[Path]
    address: Address

    def deploy(self, *versions: int, project: str = "shop", **more: Any) -> Address:
        from mlops_ray.serving.deployment.deploy import deploy

        names = ["champion", "first", "second"]
        specs = [
            ModelSpec(alias=alias, version=version, path=str(self.packages[version - 1]))
            for alias, version in zip(names, versions, strict=False)
        ]
        return deploy(project, self.home, self.serving, shop.features(), "buys", specs, **more)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def same(left: Any, right: Any) -> bool:
    """Whether scores are equal up to float32 arithmetic in batches of other sizes."""
    return bool(np.allclose(left, right, rtol=0, atol=1e-6))


def shared_serving(**more: Any) -> Serving:
    """What fits the Serve of the session's cluster, or what it is to be started with: with gRPC."""
    from mlops_ray.serving.deployment.runtime import describe

    found = describe()
    port = found.port if found else free_port()
    grpc_port = found.grpc_port if found else free_port()
    grpc = Grpc(enabled=True, port=grpc_port) if grpc_port else Grpc()
    return Serving(port=port, grpc=grpc, **more)
