"""Requests of every kind, made from the endpoint's own OpenAPI document and beside it."""

from __future__ import annotations

import asyncio
import copy
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import shop
from serving.harness import LocalShop, open_local
from serving.test_serving_arrays import stream

from mlops_ray import __version__
from mlops_ray.config.serving import Serving
from mlops_ray.metadata.home import Home
from mlops_ray.serving.formats import openapi
from mlops_ray.serving.formats.answers import ARROW
from mlops_ray.serving.formats.safetensors_body import SAFETENSORS

SERVING = Serving(max_body_bytes=200_000, max_rows=16)
DOCUMENT = openapi.document("shop", shop.features().services["buys"].inputs, SERVING, __version__)
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
PREDICT = "/v1/models/shop/predict"
INFER = "/v2/models/shop/infer"
LIMIT_S = 20.0
CASES = 30


class Hang(BaseException):
    """No ``Exception``, so that nothing on the way makes an answer of it."""


@contextmanager
def no_longer_than(limit_s: float) -> Iterator[None]:
    """End what is done inside, also where it blocks the event loop."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Hang(f"no answer within {limit_s} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_handler_that_blocks_the_event_loop_is_seen() -> None:
    async def handler() -> None:
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("it was taken for a fault of the handler")

    with pytest.raises(Hang), asyncio.Runner() as runner, no_longer_than(0.05):
        runner.run(handler())


class Door:
    """An endpoint with its own event loop; counts what it answered."""

    def __init__(self, local: LocalShop, runner: asyncio.Runner) -> None:
        self.local = local
        self.runner = runner
        self.answered: Counter[tuple[str, int]] = Counter()

    def send(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        with no_longer_than(LIMIT_S):
            reply = self.runner.run(self.local.send(method, path, body, headers))
        self.answered[path, reply[0]] += 1
        return reply


@pytest.fixture(scope="module")
def door(
    shop_home: Home, packages: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    local = open_local(shop_home, packages, Home(tmp_path_factory.mktemp("log")), SERVING)
    with asyncio.Runner() as runner:
        runner.run(local.endpoint.reconfigure(local.config(1)))
        yield Door(local, runner)


def only_json(document: Any) -> Any:
    """The document with bodies of JSON only: the others are made below."""
    content = copy.deepcopy(document)
    for item in content["paths"].values():
        for operation in item.values():
            if isinstance(operation, dict) and "requestBody" in operation:
                bodies = operation["requestBody"]["content"]
                operation["requestBody"]["content"] = {
                    "application/json": bodies["application/json"]
                }
    return content


SCHEMA = schemathesis.openapi.from_dict(only_json(DOCUMENT))
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations()]
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
KINDS = [(operation, POSITIVE) for operation in OPERATIONS] + [
    (operation, NEGATIVE)
    for operation in OPERATIONS
    if operation.body or operation.headers or operation.path_parameters
]


@pytest.mark.parametrize(
    ("operation", "mode"), KINDS, ids=[f"{o.label}-{mode.value}" for o, mode in KINDS]
)
def test_cases_of_the_document(door: Door, operation: Any, mode: Any) -> None:
    cases = CASES if operation.body else 5

    @settings(
        max_examples=cases,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        given_ = case.as_transport_kwargs(base_url="http://shop")
        request = requests.Request(
            **{k: v for k, v in given_.items() if k in ("method", "url", "headers", "json", "data")}
        ).prepare()
        body = request.body.encode() if isinstance(request.body, str) else request.body or b""
        path = request.path_url.partition("?")[0]
        headers = {name.lower(): _header(value) for name, value in request.headers.items()}
        headers.pop("content-length", None)
        status, answered, content = door.send(request.method or "", path, body, headers)
        assert status < 500 or (status == 504 and "x-request-timeout-ms" in headers)
        listed = {name: [value] for name, value in answered.items()}
        reply = Response(status, listed, content, request, 0.0, True)
        case.validate_response(reply, checks=CHECKS)

    check()


def _header(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def table(rows: int) -> pa.Table:
    return pa.table(
        {
            "customer": ["anna"] * rows,
            "shop": [7] * rows,
            "amount": [12.5] * rows,
            "coupon": pa.array([None] * rows, pa.string()),
            "member": [True] * rows,
            "at": pa.array([shop.NOW] * rows, pa.timestamp("us", "UTC")),
        }
    )


def tensors(rows: int) -> bytes:
    text = np.frombuffer(b"anna" * rows, np.uint8).reshape(rows, 4)
    return save(
        {
            "customer": text,
            "shop": np.full(rows, 7),
            "amount": np.full(rows, 12.5, np.float32),
            "coupon": text,
            "coupon.valid": np.zeros(rows, np.bool_),
            "member": np.ones(rows, np.bool_),
            "at": np.full(rows, shop.NOW_US),
        }
    )


SOUND = {
    ARROW.decode(): stream(table(3)),
    SAFETENSORS.decode(): tensors(3),
    "application/json": orjson.dumps({"rows": [shop.ROW] * 3}),
}


@pytest.mark.parametrize("kind", list(SOUND))
def test_all_forms_have_the_same_answer(door: Door, kind: str) -> None:
    status, _, content = door.send("POST", PREDICT, SOUND[kind], {"content-type": kind})
    by_json = door.send("POST", PREDICT, SOUND["application/json"], {})[2]
    assert status == 200
    assert orjson.loads(content)["scores"] == pytest.approx(
        orjson.loads(by_json)["scores"], abs=1e-6
    )
    headers = {"content-type": kind, "accept": ARROW.decode()}
    status, answered, content = door.send("POST", PREDICT, SOUND[kind], headers)
    assert (status, answered["content-type"]) == (200, ARROW.decode())
    scores = pa.ipc.open_stream(content).read_all()["score"].to_pylist()
    assert scores == pytest.approx(orjson.loads(by_json)["scores"], abs=1e-6)


damage = st.tuples(st.sampled_from(sorted(SOUND)), st.integers(0, 2**32), st.booleans())


@settings(max_examples=300, deadline=None)
@given(damage)
def test_damaged_bodies_are_refused(door: Door, damage: tuple[str, int, bool]) -> None:
    kind, seed, cut = damage
    chance = random.Random(seed)
    body = bytearray(SOUND[kind])
    for _ in range(chance.randint(1, 4)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    if cut:
        body = body[: chance.randrange(len(body))]
    path = chance.choice([PREDICT, INFER])
    headers = {"content-type": kind}
    if path == INFER and chance.random() < 0.5:
        headers["inference-header-content-length"] = str(chance.randrange(len(SOUND[kind])))
    status, _, content = door.send("POST", path, bytes(body), headers)
    assert status in (200, 400, 413, 422)
    assert status == 200 or "error" in orjson.loads(content)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([*SOUND, "text/csv", "", "a/b; c"]))
def test_noise_is_refused(door: Door, body: bytes, kind: str) -> None:
    for path in (PREDICT, INFER, "/v1/models/shop/feedback", "/v1/models/shop/explain"):
        status, _, _ = door.send("POST", path, body, {"content-type": kind})
        assert status in (400, 413, 415, 422)


def test_the_document_is_served_as_it_is(door: Door) -> None:
    status, _, content = door.send("GET", "/openapi.json", b"", {})
    assert status == 200
    assert orjson.loads(content) == orjson.loads(orjson.dumps(DOCUMENT))


def test_without_a_model_it_says_so_as_documented(
    shop_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    local = open_local(shop_home, packages, Home(tmp_path), SERVING)
    row = {"inputs": []}
    calls = [("GET", "/readyz", b""), ("GET", "/v2/health/ready", b"")]
    calls += [("POST", PREDICT, SOUND["application/json"]), ("POST", INFER, orjson.dumps(row))]
    with asyncio.Runner() as runner:
        for method, path, body in calls:
            status, _, content = runner.run(local.send(method, path, body))
            declared = DOCUMENT["paths"][path][method.lower()]["responses"]
            assert str(status) in declared
            assert status == (422 if path == INFER else 503), content
