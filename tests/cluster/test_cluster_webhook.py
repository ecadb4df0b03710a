"""The webhook server over real HTTP."""

from __future__ import annotations

import hashlib
import hmac
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from mlops_ray.cluster.webhook import WebhookServer
from mlops_ray.config.triggers import Webhook
from mlops_ray.errors import ClusterError

SECRET = "a secret"


class Receiver:
    def __init__(self) -> None:
        self.deliveries: list[tuple[str, str, Any, dict[str, str]]] = []
        self.acts = True

    def __call__(self, name: str, delivery: str, payload: Any, told: dict[str, str]) -> bool:
        if not self.acts:
            raise ClusterError("another process acts")
        new = all(delivery != known[1] for known in self.deliveries)
        self.deliveries.append((name, delivery, payload, told))
        return new


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def url(receiver: Receiver) -> Iterator[str]:
    server = WebhookServer(Webhook(port=0, body_bytes=100_000), SECRET, {"hook"}, receiver)
    yield server.start()
    server.close()


def sign(body: bytes, secret: str = SECRET) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def post(url: str, body: bytes, **headers: str | None) -> int:
    given = {
        "X-Hub-Signature-256": sign(body),
        "X-GitHub-Delivery": "d-1",
        "Content-Type": "application/json",
    }
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    kept = {name: value for name, value in given.items() if value is not None}
    request = urllib.request.Request(url, data=body, headers=kept, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_signed_delivery_is_taken_once(url: str, receiver: Receiver) -> None:
    body = json.dumps({"ref": "refs/heads/main"}).encode()
    assert post(url + "hook", body, X_GitHub_Event="push") == 202
    assert post(url + "hook", body) == 200
    assert receiver.deliveries[0] == (
        "hook",
        "d-1",
        {"ref": "refs/heads/main"},
        {"event": "push"},
    )


def test_the_signature_of_github_s_documentation_is_known() -> None:
    """The example that GitHub gives for its header."""
    expected = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert sign(b"Hello, World!", "It's a Secret to Everybody") == expected


@pytest.mark.parametrize(
    ("name", "body", "headers", "status"),
    [
        ("hook", b"{}", {"X_Hub_Signature_256": sign(b"{}", "another secret")}, 401),
        ("hook", b"{}", {"X_Hub_Signature_256": sign(b"{ }")}, 401),
        ("hook", b"{}", {"X_Hub_Signature_256": None}, 401),
        ("hook", b"{}", {"X_Hub_Signature_256": "sha256=é"}, 401),
        ("other", b"{}", {"X_Hub_Signature_256": None}, 401),
        ("other", b"{}", {}, 404),
        ("hook", b"{}", {"X_GitHub_Delivery": None}, 400),
        ("hook", b"{}", {"X_GitHub_Delivery": "a/b"}, 400),
        ("hook", b"not JSON", {}, 400),
        ("hook", b"[" * 100_000, {}, 400),
        ("hook", b" " * 100_001, {}, 413),
        ("hook", b"{}", {"X_GitHub_Event": "ping"}, 200),
    ],
)
def test_what_is_not_taken(
    url: str,
    receiver: Receiver,
    name: str,
    body: bytes,
    headers: dict[str, str | None],
    status: int,
) -> None:
    assert post(url + name, body, **headers) == status
    assert receiver.deliveries == []


def test_another_sender_names_its_deliveries_in_a_header_of_its_own(
    url: str, receiver: Receiver
) -> None:
    assert post(url + "hook", b"", X_GitHub_Delivery=None, X_Delivery_Id="7") == 202
    assert receiver.deliveries == [("hook", "7", None, {})]


def test_one_that_does_not_act_asks_to_come_again(url: str, receiver: Receiver) -> None:
    receiver.acts = False
    assert post(url + "hook", b"{}") == 503


def test_a_port_that_is_taken_is_said(url: str, receiver: Receiver) -> None:
    port = int(url.split(":")[2].partition("/")[0])
    with pytest.raises(ClusterError, match=r"webhook\.port"):
        WebhookServer(Webhook(port=port), SECRET, {"hook"}, receiver).start()
