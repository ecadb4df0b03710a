"""TLS and gRPC on a real cluster: a Serve of the module's own, started with a certificate."""

from __future__ import annotations

import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import shop
from serving.certificates import write_certificate
from serving.harness import Served, free_port

from mlops_ray.cluster.doctor import _serving
from mlops_ray.config.serving import Grpc, Security, Serving
from mlops_ray.errors import ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Endpoint
from mlops_ray.serving.client.http import Client
from mlops_ray.serving.deployment import runtime
from mlops_ray.serving.deployment.listing import endpoints


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Security:
    written, key = write_certificate(tmp_path_factory.mktemp("tls"))
    return Security(certificate=written, key=key)


def deployed(home: Home, packages: list[Path], serving: Serving) -> Iterator[Served]:
    """The shop on a Serve that ends with the test, as one before it does."""
    from ray import serve

    serve.shutdown()
    served = Served(home, serving, packages, Endpoint(name="shop", url="", versions={}))
    served.address = served.deploy(1)
    yield served
    serve.shutdown()


@pytest.fixture(scope="module")
def private(
    ray_cluster: Any, shop_home: Home, packages: list[Path], certificate: Security
) -> Iterator[Served]:
    """The shop in throughput mode, with TLS for HTTP and gRPC."""
    grpc = Grpc(enabled=True, port=free_port())
    yield from deployed(
        shop_home, packages, Serving(port=free_port(), security=certificate, grpc=grpc)
    )


@pytest.fixture
def default(
    ray_cluster: Any, shop_home: Home, packages: list[Path], certificate: Security
) -> Iterator[Served]:
    """The shop in default mode, with TLS."""
    serving = Serving(port=free_port(), mode="default", security=certificate)
    yield from deployed(shop_home, packages, serving)


def check_http(served: Served, security: Security) -> None:
    assert served.address.url.startswith("https://")
    client = Client(served.address, ca_file=security.certificate)
    assert client.predict([shop.ROW]).version == 1
    client.close()
    with pytest.raises(ServingError, match="does not answer"):
        Client(served.address, retries=None).predict([shop.ROW])
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(served.address.url.replace("https", "http"), timeout=10)


def test_clients_that_trust_the_certificate_are_answered(
    private: Served, certificate: Security
) -> None:
    check_http(private, certificate)


def test_old_protocols_are_refused(private: Served, certificate: Security) -> None:
    context = ssl.create_default_context(cafile=str(certificate.certificate))
    with socket.create_connection(("127.0.0.1", private.serving.port)) as plain:
        assert context.wrap_socket(plain, server_hostname="127.0.0.1").version() == "TLSv1.3"
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", private.serving.port)) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_grpc_speaks_tls(private: Served, certificate: Security) -> None:
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    address = f"127.0.0.1:{private.serving.grpc.port}"
    with InferenceServerClient(
        address, ssl=True, root_certificates=str(certificate.certificate)
    ) as client:
        assert client.is_server_live()
        assert client.is_model_ready("shop")
    with (
        InferenceServerClient(address) as plain,
        pytest.raises(InferenceServerException, match="UNAVAILABLE"),
    ):
        plain.is_server_live(client_timeout=5)


def test_what_serve_was_started_with_is_known(private: Served) -> None:
    found = runtime.describe()
    assert found is not None
    assert (found.mode, found.tls, found.ours) == ("throughput", True, True)
    assert found.grpc_port == private.serving.grpc.port
    listed = endpoints()
    assert [(one.name, one.versions, one.shares) for one in listed] == [
        ("shop", {"champion": 1}, {"champion": 1})
    ]
    assert listed[0].url == f"{private.address.url}/v1/models/shop"
    messages = "\n".join(finding.message for finding in _serving())
    assert f"throughput mode on port {private.serving.port}" in messages
    assert f"TLS; gRPC on port {private.serving.grpc.port}" in messages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"security": Security()}, "runs with TLS"),
        ({"port": 1}, "runs on port"),
        ({"grpc": Grpc(enabled=True, port=1)}, "runs on port"),
    ],
)
def test_what_does_not_fit_is_refused(private: Served, changes: Any, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        runtime.start(private.serving.model_copy(update=changes))


def test_default_mode_speaks_tls(default: Served, certificate: Security) -> None:
    check_http(default, certificate)
    found = runtime.describe()
    assert found is not None
    assert (found.mode, found.tls) == ("default", True)
