"""gRPC calls by a public client: the same answers, checks and refusals as over HTTP."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import shop
from serving.harness import LocalShop, open_local, same
from serving.test_serving_grpc_content import VALID, flawed, inputs, triton_request
from tritonclient.grpc import aio as triton
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from mlops_ray.config.serving import Security, Serving
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint import tokens
from mlops_ray.serving.grpc.inference import Inference
from mlops_ray.serving.grpc.methods import InferenceMethods
from mlops_ray.serving.grpc.service import add_to_server

Code = grpc.StatusCode


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def body(*args: Any, **more: Any) -> None:
        asyncio.run(test(*args, **more))  # type: ignore[arg-type]

    return body


class Servicer(InferenceMethods):
    """Calls the methods as a Ray Serve replica does: the reply is asked for its bytes."""

    def __init__(self, local: LocalShop) -> None:
        self._inference = Inference(local.endpoint)
        for name in ("ServerLive", "ServerReady", "ServerMetadata"):
            setattr(self, name, self._as_bytes(getattr(self, name)))
        for name in ("ModelReady", "ModelMetadata", "ModelInfer"):
            setattr(self, name, self._as_bytes(getattr(self, name)))

    def _as_bytes(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[bytes]]:
        async def call(request: bytes, context: Any) -> bytes:
            reply: bytes = (await method(request, grpc_context=context)).SerializeToString()
            return reply

        return call


@asynccontextmanager
async def serving(local: LocalShop, *versions: int) -> AsyncIterator[str]:
    """The shop behind a gRPC server in this loop; yields its address."""
    if versions:
        await local.endpoint.reconfigure(local.config(*versions))
    server = grpc.aio.server()
    add_to_server(Servicer(local), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def client(local: LocalShop, *versions: int) -> AsyncIterator[triton.InferenceServerClient]:
    async with serving(local, *versions) as address, triton.InferenceServerClient(address) as made:
        yield made


async def refused(call: Awaitable[Any]) -> tuple[str, str]:
    """Return status and details of a call that fails."""
    with pytest.raises(InferenceServerException) as caught:
        await call
    return caught.value.status(), caught.value.message()


async def infer_refused(
    address: str, request: Any, metadata: tuple[tuple[str, str], ...] = (), **more: Any
) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(request, metadata=metadata, **more)
    return caught.value


@asynchronous
async def test_health_and_readiness_follow_the_models(local: LocalShop) -> None:
    async with client(local) as found:
        assert await found.is_server_live()
        assert not await found.is_server_ready()
        assert not await found.is_model_ready("shop")
        assert (await refused(found.infer("shop", inputs())))[0] == "StatusCode.UNAVAILABLE"
        await local.endpoint.reconfigure(local.config(1, 2))
        assert await found.is_server_ready()
        assert await found.is_model_ready("shop")
        assert await found.is_model_ready("shop", "2")
        assert not await found.is_model_ready("shop", "3")
        assert not await found.is_model_ready("shop", "two")
        assert not await found.is_model_ready("shoe")


@asynchronous
async def test_metadata_is_that_of_http(local: LocalShop) -> None:
    async with client(local, 1, 2) as found:
        server = await found.get_server_metadata(as_json=True)
        status, wanted = await local.call("GET", "/v2")
        assert (status, server) == (200, wanted)
        model = await found.get_model_metadata("shop", as_json=True)
        status, wanted = await local.call("GET", "/v2/models/shop")
        assert status == 200
        for tensor in (*model["inputs"], *model["outputs"]):
            tensor["shape"] = [int(size) for size in tensor["shape"]]  # JSON's int64 are texts
        assert model == wanted
        assert (await found.get_model_metadata("shop", "2", as_json=True))["versions"] == ["2"]
        assert (await refused(found.get_model_metadata("shoe")))[0] == "StatusCode.NOT_FOUND"


@asynchronous
async def test_scores_are_those_of_http_and_are_logged(local: LocalShop) -> None:
    rows = [shop.ROW | {"coupon": "spring", "shop": 0, "amount": 0.0}]
    rows.append(rows[0] | {"customer": "bert", "shop": 1, "amount": 1.0})
    async with client(local, 1) as found:
        result = await found.infer("shop", inputs(), request_id="r1")
        wanted = await local.predict(rows)
        assert same(result.as_numpy("score"), wanted["scores"])
        assert result.as_numpy("label").tolist() == wanted["labels"]
        assert result.as_numpy("version").tolist() == [1, 1]
        answered = result.get_response()
        assert (answered.id, answered.model_name, answered.model_version) == ("r1", "shop", "1")
        assert local.endpoint.log.pending_rows == 4
        await found.infer("shop", inputs(), headers={"x-mlops-ray-log": "off"})
        assert local.endpoint.log.pending_rows == 4


@asynchronous
async def test_a_version_can_be_asked_for(local: LocalShop) -> None:
    async with client(local, 1, 2) as found:
        first = await found.infer("shop", inputs())
        second = await found.infer("shop", inputs(), model_version="2")
        assert second.as_numpy("version").tolist() == [2, 2]
        assert not same(first.as_numpy("score"), second.as_numpy("score"))
        status, details = await refused(found.infer("shop", inputs(), model_version="9"))
        assert status == "StatusCode.NOT_FOUND"
        assert "9" in details
        assert (await refused(found.infer("shoe", inputs())))[0] == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize(
    ("change", "field", "row"),
    [
        ("out of range", "amount", "1"),
        ("not a number", "amount", "0"),
        ("unknown input", "amuont", None),
    ],
)
@asynchronous
async def test_a_refusal_names_field_and_row(
    local: LocalShop, change: str, field: str, row: str | None
) -> None:
    async with serving(local, 1) as address:
        error = await infer_refused(address, flawed(change))
    assert error.code() == Code.INVALID_ARGUMENT
    trailing = dict(error.trailing_metadata())
    assert (trailing["field"], trailing.get("row")) == (field, row)
    assert field in error.details()
    assert row is None or f"row {row}" in error.details()


@asynchronous
async def test_what_is_quoted_may_be_any_text(local: LocalShop) -> None:
    request = flawed("unknown input")
    request.inputs[2].name = "größe\n☃"
    async with serving(local, 1) as address:
        error = await infer_refused(address, request)
    assert error.code() == Code.INVALID_ARGUMENT
    assert "größe" in error.details()
    assert dict(error.trailing_metadata())["field"] == "gr%C3%B6%C3%9Fe%0A%E2%98%83"


@asynchronous
async def test_a_large_message_is_refused(
    shop_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    local = open_local(shop_home, packages, Home(tmp_path / "log"), Serving(max_body_bytes=1000))
    async with client(local, 1) as found:
        status, details = await refused(found.infer("shop", inputs(500)))
        assert status == "StatusCode.INVALID_ARGUMENT"
        assert "1000" in details


@asynchronous
async def test_too_many_rows_are_refused(
    shop_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    local = open_local(shop_home, packages, Home(tmp_path / "log"), Serving(max_rows=3))
    async with client(local, 1) as found:
        assert (await found.infer("shop", inputs(3))).as_numpy("score").shape == (3,)
        assert (await refused(found.infer("shop", inputs(4))))[0] == "StatusCode.INVALID_ARGUMENT"


@asynchronous
async def test_tokens(shop_home: Home, packages: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    both = tokens.add(path, "both", ("predict", "metadata"))
    only = tokens.add(path, "only", ("metadata",))
    slow = tokens.add(path, "slow", ("predict",), rate=0.001, burst=1)
    secured = Serving(security=Security(tokens=path))
    local = open_local(shop_home, packages, Home(tmp_path / "log"), secured)

    def bearer(token: str) -> dict[str, str]:
        return {"authorization": f"Bearer {token}"}

    async with client(local, 1) as found:
        assert await found.is_server_ready()
        assert (await refused(found.infer("shop", inputs())))[0] == "StatusCode.UNAUTHENTICATED"
        for call in (
            found.get_server_metadata(),
            found.get_model_metadata("shop"),
            found.is_model_ready("shop"),
        ):
            assert (await refused(call))[0] == "StatusCode.UNAUTHENTICATED"
        assert await found.is_model_ready("shop", headers=bearer(only))
        wrong = found.infer("shop", inputs(), headers=bearer(both[:-1]))
        assert (await refused(wrong))[0] == "StatusCode.UNAUTHENTICATED"
        unscoped = found.infer("shop", inputs(), headers=bearer(only))
        assert (await refused(unscoped))[0] == "StatusCode.PERMISSION_DENIED"
        assert await found.get_model_metadata("shop", headers=bearer(only))
        assert await found.infer("shop", inputs(), headers=bearer(both))
        quiet = {"x-mlops-ray-log": "off"}
        unlogged = found.infer("shop", inputs(), headers=bearer(both) | quiet)
        assert (await refused(unlogged))[0] == "StatusCode.PERMISSION_DENIED"
        assert await found.infer("shop", inputs(), headers=bearer(slow))
    async with serving(local) as address:
        metadata = tuple(bearer(slow).items())
        error = await infer_refused(address, triton_request(inputs()), metadata)
    assert error.code() == Code.RESOURCE_EXHAUSTED
    assert 0 < int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) <= 1_000_000


@asynchronous
async def test_no_model_is_loaded_for_who_may_not_ask(
    shop_home: Home, packages: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "tokens.json"
    token = tokens.add(path, "alice", ("metadata",))
    asked: list[str] = []

    async def many(name: str) -> Any:
        asked.append(name)
        return local.endpoint.models.own()

    secured = Serving(security=Security(tokens=path), max_ongoing_requests=1, max_queued_requests=0)
    local = open_local(shop_home, packages, Home(tmp_path / "log"), secured, many=many)
    async with client(local, 1) as found:
        status, _ = await refused(found.is_model_ready("cafe"))
        assert (status, asked) == ("StatusCode.UNAUTHENTICATED", [])
        headers = {"authorization": f"Bearer {token}"}
        async with local.endpoint.limits.turn():
            status, _ = await refused(found.is_model_ready("cafe", headers=headers))
            assert (status, asked) == ("StatusCode.UNAVAILABLE", [])
        assert await found.is_model_ready("cafe", headers=headers)
        assert asked == ["cafe"]


@asynchronous
async def test_stale_features_are_told(local: LocalShop, monkeypatch: pytest.MonkeyPatch) -> None:
    real = local.endpoint.scoring.score

    async def stale(*args: Any, **more: Any) -> Any:
        answer = await real(*args, **more)
        answer.stale = True
        return answer

    async with client(local, 1) as found:
        fresh = (await found.infer("shop", inputs())).get_response()
        assert not fresh.parameters
        monkeypatch.setattr(local.endpoint.scoring, "score", stale)
        told = (await found.infer("shop", inputs())).get_response()
        assert told.parameters["x-mlops-ray-features"].string_param == "stale"


@pytest.mark.parametrize("how", ["metadata", "parameter"])
@asynchronous
async def test_time_that_is_up(local: LocalShop, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(local.endpoint.scoring, "score", forever)
    request = triton_request(inputs(), timeout=20_000 if how == "parameter" else None)
    metadata = (("x-request-timeout-ms", "20"),) if how == "metadata" else ()
    async with serving(local, 1) as address:
        error = await infer_refused(address, request, metadata)
    assert error.code() == Code.DEADLINE_EXCEEDED
    assert "20 ms" in error.details()
    assert local.endpoint.limits.in_flight == 0


@asynchronous
async def test_a_time_limit_that_is_none(local: LocalShop) -> None:
    async with serving(local, 1) as address:
        metadata = (("x-request-timeout-ms", "soon"),)
        error = await infer_refused(address, triton_request(inputs()), metadata)
    assert error.code() == Code.INVALID_ARGUMENT


@asynchronous
async def test_a_client_s_deadline_ends_the_work(
    local: LocalShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.endpoint.scoring, "score", forever)
    async with serving(local, 1) as address:
        error = await infer_refused(address, triton_request(inputs()), timeout=0.1)
        assert error.code() == Code.DEADLINE_EXCEEDED
        async with asyncio.timeout(10):
            while local.endpoint.limits.in_flight:
                await asyncio.sleep(0.01)


@asynchronous
async def test_more_than_fits_is_sent_away(
    shop_home: Home, packages: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Serving(max_ongoing_requests=1, max_queued_requests=1)
    local = open_local(shop_home, packages, Home(tmp_path / "log"), narrow)
    monkeypatch.setattr(local.endpoint.scoring, "score", forever)
    async with serving(local, 1) as address:
        waiting = [
            asyncio.create_task(infer_refused(address, triton_request(inputs()), timeout=1.0))
            for _ in range(2)
        ]
        async with asyncio.timeout(10):
            while local.endpoint.limits.in_flight < 2:
                await asyncio.sleep(0.01)
        error = await infer_refused(address, triton_request(inputs()))
        assert error.code() == Code.UNAVAILABLE
        assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
        await asyncio.gather(*waiting)


@asynchronous
async def test_a_failure_inside_says_nothing_of_the_inside(
    local: LocalShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: Any, **more: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(local.endpoint.scoring, "score", broken)
    async with serving(local, 1) as address:
        error = await infer_refused(address, triton_request(inputs()))
    assert error.code() == Code.INTERNAL
    assert "secret" not in str(error)


@asynchronous
async def test_calls_are_counted(local: LocalShop, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[Any, ...]] = []
    monkeypatch.setattr(local.endpoint.recorder, "request", lambda *what: counted.append(what[:4]))
    async with client(local, 1) as found:
        await found.infer("shop", inputs())
        await refused(found.infer("shoe", inputs()))
    assert counted == [("grpc_infer", 200, "champion", 1), ("grpc_infer", 404, "", 0)]


@given(
    body=st.binary(max_size=60) | st.just(VALID),
    method=st.sampled_from(["ModelInfer", "ModelMetadata"]),
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_message_is_an_internal_error(local: LocalShop, body: bytes, method: str) -> None:
    context = Context()
    reply = asyncio.run(Inference(local.endpoint).answer(method, body, context))
    assert reply.content == b""
    assert context.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNAVAILABLE)


async def forever(*args: Any, **more: Any) -> Any:
    await asyncio.sleep(3600)


class Context:
    """What Serve hands to a method."""

    code: Any = None

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        details.encode()

    def set_trailing_metadata(self, metadata: list[tuple[str, str]]) -> None:
        assert all(value.isascii() for _, value in metadata)
