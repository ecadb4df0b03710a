"""Clients against a server that drops, stalls, refuses and answers by halves."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from serving import misbehaving
from serving.misbehaving import Request, Server, drop, half, later, says, silent, together

from mlops_ray import AsyncClient, Client, Hedging, Prediction, RequestError, Retries, ServingError
from mlops_ray.serving.client import wire
from mlops_ray.serving.client.hedging import Hedger
from mlops_ray.serving.formats.answers import Answer, arrow_answer
from mlops_ray.serving.formats.arrow_body import read_stream

ROWS = [{"amount": 1.0}, {"amount": 2.0}]
QUICK = Retries(first_pause_s=0.001, longest_pause_s=0.002)

Ask = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


@pytest.fixture(params=["threads", "event loop"])
def ask(request: pytest.FixtureRequest, server: Server) -> Iterator[Ask]:
    """Calls a method of either client: ``ask("predict", rows, retries=…)``."""

    def blocking(
        method: str, *args: Any, call: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        with Client(server.endpoint, **options) as client:
            return getattr(client, method)(*args, **(call or {}))

    def looping(method: str, *args: Any, call: dict[str, Any] | None = None, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(server.endpoint, **options) as client:
                return await getattr(client, method)(*args, **(call or {}))

        return asyncio.run(run())

    return blocking if request.param == "threads" else looping


def test_what_is_asked_and_what_comes_back(server: Server, ask: Ask) -> None:
    found = ask("predict", ROWS, call={"ids": ["a", "b"], "log": False}, token="secret")
    assert found == Prediction(["a", "b"], [0.5, 0.5], [1, 1], [3, 3], ["champion"] * 2)
    assert found.version == 3
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", "/v1/models/shop/predict")
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["x-mlops-ray-log"] == "off"
    assert request.headers["content-type"] == "application/json"


@pytest.mark.parametrize("flaw", [drop, half, later(503), later(502), later(429, "0")])
def test_a_prediction_is_repeated_with_the_same_ids(
    server: Server, ask: Ask, flaw: misbehaving.Behaviour
) -> None:
    server.script = [flaw, flaw]
    found = ask("predict", ROWS, retries=QUICK)
    assert len(server.requests) == 3
    assert len({tuple(request.ids) for request in server.requests}) == 1
    assert found.ids == server.requests[0].ids
    assert len(set(found.ids)) == len(server.counted) == len(ROWS)


def test_no_two_calls_share_an_id(server: Server, ask: Ask) -> None:
    for _ in range(3):
        ask("predict", ROWS)
        ask("predict", call={"columns": {"amount": [1.0, 2.0]}})
    assert len(server.counted) == 12


@pytest.mark.parametrize("flaw", [drop, half, later(503)])
def test_without_retries_what_breaks_is_seen(
    server: Server, ask: Ask, flaw: misbehaving.Behaviour
) -> None:
    server.script = [flaw]
    with pytest.raises(ServingError):
        ask("predict", ROWS, retries=None)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_final(server: Server, ask: Ask, status: int) -> None:
    error = {"message": "amount must be less", "field": "amount", "row": 1}
    server.script = [says(status, {"error": error})]
    with pytest.raises(RequestError, match="must be less") as caught:
        ask("predict", ROWS, retries=QUICK)
    assert (caught.value.status, caught.value.field, caught.value.row) == (status, "amount", 1)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 504])
def test_a_failure_of_the_server_is_final(server: Server, ask: Ask, status: int) -> None:
    server.script = [says(status, {"error": {"message": "broken", "field": None, "row": None}})]
    with pytest.raises(ServingError, match=f"answered {status}: broken"):
        ask("predict", ROWS, retries=QUICK)
    assert len(server.requests) == 1


def test_retry_after_is_waited_for(server: Server, ask: Ask) -> None:
    server.script = [later(503, "1")]
    ask("predict", ROWS, retries=QUICK)
    first, second = server.requests
    assert second.at_s - first.at_s >= 1


def test_a_wait_that_outlasts_the_call_is_not_begun(server: Server, ask: Ask) -> None:
    server.script = [later(429, "3600")]
    with pytest.raises(RequestError) as caught:
        ask("predict", ROWS, retries=QUICK, timeout_s=20)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 3600.0)
    assert len(server.requests) == 1


def test_tries_are_bounded(server: Server, ask: Ask) -> None:
    server.script = [drop] * 20
    with pytest.raises(ServingError, match="does not answer"):
        ask("predict", ROWS, retries=Retries(attempts=3, first_pause_s=0.001))
    assert len(server.requests) == 3


@pytest.mark.parametrize("kind", ["threads", "event loop"])
def test_the_budget_holds_over_many_calls(server: Server, kind: str) -> None:
    server.script = [drop] * 1000
    calls = 40
    retries = Retries(first_pause_s=0.0, longest_pause_s=0.0, share=0.25, reserve=4)
    if kind == "threads":
        with Client(server.endpoint, retries=retries) as client:
            for _ in range(calls):
                with pytest.raises(ServingError):
                    client.predict(ROWS)
    else:

        async def run() -> None:
            async with AsyncClient(server.endpoint, retries=retries) as client:
                asked = [client.predict(ROWS) for _ in range(calls)]
                found = await asyncio.gather(*asked, return_exceptions=True)
                assert all(isinstance(one, ServingError) for one in found)

        asyncio.run(run())
    assert calls < len(server.requests) <= calls + 4 + 0.25 * calls


def test_the_time_that_is_left_is_told(server: Server, ask: Ask) -> None:
    server.script = [drop, later(503, "1")]
    ask("predict", ROWS, retries=QUICK, call={"timeout_s": 20})
    told = [int(request.headers["x-request-timeout-ms"]) for request in server.requests]
    assert 20_000 >= told[0] >= told[1] >= told[2] + 1000


def test_a_server_that_says_nothing_is_given_up(server: Server, ask: Ask) -> None:
    server.script = [silent] * 5
    with pytest.raises(ServingError, match="does not answer"):
        ask("predict", ROWS, timeout_s=0.2)
    server.wait_for(lambda: server.abandoned == 1)
    assert len(server.requests) == 1


def test_a_port_where_nobody_listens(server: Server, ask: Ask) -> None:
    server.stop()
    with pytest.raises(ServingError, match="does not answer"):
        ask("predict", ROWS, retries=QUICK)
    assert ask("ready", retries=QUICK) is False
    server.__post_init__()


def test_the_hedge_wins_and_the_other_is_cancelled(server: Server, ask: Ask) -> None:
    server.script = [silent]
    found = ask("predict", ROWS, hedging=Hedging(after_s=0.01), retries=None)
    assert found.scores == [0.5, 0.5]
    first, second = server.requests
    assert first.ids == second.ids == found.ids
    server.wait_for(lambda: server.abandoned == 1)
    assert max(server.counted.values()) == 1


def test_the_first_answer_counts_when_the_hedge_fails(server: Server, ask: Ask) -> None:
    server.script = [together(2), drop]

    async def second(*args: Any) -> None:
        server.together.set()
        await drop(*args)

    server.script[1] = second
    found = ask("predict", ROWS, hedging=Hedging(after_s=0.01), retries=None)
    assert found.scores == [0.5, 0.5]
    assert len(server.requests) == 2


def test_a_refusal_for_now_does_not_beat_an_answer(server: Server, ask: Ask) -> None:
    async def refuse(*args: Any) -> None:
        await server.together.wait()
        await later(503)(*args)

    async def come_last(*args: Any) -> None:
        server.together.set()
        await asyncio.sleep(0.05)
        await misbehaving.answer(*args)

    server.script = [refuse, come_last]
    found = ask("predict", ROWS, hedging=Hedging(after_s=0.01), retries=None)
    assert found.scores == [0.5, 0.5]
    assert len(server.requests) == 2


def test_both_fail_and_it_is_tried_again(server: Server, ask: Ask) -> None:
    server.script = [together(2), together(2)]

    async def fail(*args: Any) -> None:
        server.waiting += 1
        if server.waiting == 2:
            server.together.set()
        await server.together.wait()
        await drop(*args)

    server.script = [fail, fail]
    found = ask("predict", ROWS, hedging=Hedging(after_s=0.01), retries=QUICK)
    assert found.ids == server.requests[2].ids


@pytest.mark.parametrize("kind", ["threads", "event loop"])
def test_hedges_keep_to_their_budget(server: Server, kind: str) -> None:
    server.script = [silent] * 6
    hedging = Hedging(after_s=0.0, share=0.0, reserve=2)
    if kind == "threads":
        with Client(server.endpoint, hedging=hedging, retries=None, timeout_s=0.3) as client:
            for _ in range(4):
                with pytest.raises(ServingError):
                    client.predict(ROWS)
    else:

        async def run() -> list[Any]:
            async with AsyncClient(
                server.endpoint, hedging=hedging, retries=None, timeout_s=0.3
            ) as client:
                asked = [client.predict(ROWS) for _ in range(4)]
                return await asyncio.gather(*asked, return_exceptions=True)

        assert all(isinstance(one, ServingError) for one in asyncio.run(run()))
    server.wait_for(lambda: server.abandoned == 6)
    assert len(server.requests) == 6


def test_labels_are_not_sent_twice_at_once(server: Server, ask: Ask) -> None:
    server.script = [says(200, {"accepted": 1})]
    assert ask("feedback", [{"id": "a", "label": 1}], hedging=Hedging(after_s=0.0)) == 1
    assert len(server.requests) == 1


def test_an_answer_that_is_none(server: Server, ask: Ask) -> None:
    for content in (b"<html>hello</html>", {"status": "fine"}, [1], {"ids": 3}):
        server.script = [says(200, content)]
        with pytest.raises(ServingError, match="not one of an endpoint"):
            ask("predict", ROWS)
        server.script = [says(200, content)]
        with pytest.raises(ServingError, match="not one of an endpoint"):
            ask("feedback", [{"id": "a", "label": 1}])


def test_a_table_goes_and_comes_as_arrow(server: Server, ask: Ask) -> None:
    found = Answer("shop", None, None, ["x", "y"], np.array([0.25, 0.75]), [0, 1])
    found.versions, found.routes = [1, 2], ["champion", "first"]
    stream = says(200, arrow_answer(found), Content_Type=wire.ARROW)
    server.script = [drop_quietly, stream]
    table = pa.table({"amount": [1.0, 2.0]})
    got = ask("predict", call={"table": table}, retries=QUICK)
    assert got == Prediction(["x", "y"], [0.25, 0.75], [0, 1], [1, 2], ["champion", "first"])
    assert got.version is None
    first, second = (read_stream(request.body) for request in server.requests)
    assert first.equals(second)
    assert first.drop_columns("id").equals(table)
    assert len(set(first["id"].to_pylist())) == 2
    assert server.requests[0].headers["accept"] == wire.ARROW


def test_ids_of_a_table(server: Server, ask: Ask) -> None:
    named = pa.table({"amount": [1.0], "id": ["a"]})
    error = {"error": {"message": "no", "field": None, "row": None}}
    for call in ({"table": named}, {"table": named.drop_columns("id"), "ids": ["a"]}):
        server.script = [says(422, error)]
        with pytest.raises(RequestError):
            ask("predict", call=call)
        assert read_stream(server.requests[-1].body)["id"].to_pylist() == ["a"]
    with pytest.raises(ServingError, match="ids are given too"):
        ask("predict", call={"table": named, "ids": ["b"]})


def test_explanations(server: Server, ask: Ask) -> None:
    content = {"model": "shop", "version": 2, "ids": ["a"], "scores": [0.5], "base": -1.0}
    server.script = [says(200, content | {"contributions": {"amount": [1.0]}})]
    found = ask("explain", ROWS[:1])
    assert (found.base, found.contributions) == (-1.0, {"amount": [1.0]})
    assert server.requests[0].path == "/v1/models/shop/explain"


def test_metadata_and_readiness(server: Server, ask: Ask) -> None:
    server.script = [says(200, {"model": "shop"}), says(200, {}), says(503, {}), says(404, {})]
    assert ask("metadata") == {"model": "shop"}
    assert ask("ready") is True
    assert ask("ready", retries=None) is False
    assert ask("ready") is False
    assert [request.method for request in server.requests] == ["GET"] * 4


def test_threads_do_not_wait_for_each_other(server: Server) -> None:
    server.script = [together(8)] * 8
    with Client(server.endpoint) as client:
        threads = [threading.Thread(target=client.predict, args=(ROWS,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.counted) == 16


def test_connections_are_kept_and_bounded(server: Server) -> None:
    with Client(server.endpoint) as client:
        for _ in range(10):
            client.predict(ROWS)
    assert server.connections == 1

    async def many() -> None:
        async with AsyncClient(server.endpoint, connections=3) as client:
            await asyncio.gather(*(client.predict(ROWS) for _ in range(30)))

    asyncio.run(many())
    assert server.connections <= 4


def test_waiting_for_a_connection_takes_from_the_time_that_is_told(server: Server) -> None:
    server.script = [slow]

    async def run() -> None:
        async with AsyncClient(server.endpoint, connections=1, timeout_s=20) as client:
            await asyncio.gather(*(client.predict(ROWS) for _ in range(2)))

    asyncio.run(run())
    told = [int(request.headers["x-request-timeout-ms"]) for request in server.requests]
    assert told[1] <= 20_000 - 200


async def slow(server: Server, request: Request, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)
    await misbehaving.answer(server, request, writer)


def test_refusals_do_not_say_how_long_an_answer_takes(server: Server, ask: Ask) -> None:
    learned: list[float] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Hedger, "learn", lambda self, latency_s: learned.append(latency_s))
        server.script = [later(503)]
        ask("predict", ROWS, retries=QUICK, hedging=Hedging())
    assert len(server.requests) == 2
    assert len(learned) == 1


def test_a_closed_client_opens_again(server: Server) -> None:
    client = Client(server.endpoint)
    client.predict(ROWS)
    client.close()
    client.close()
    client.predict(ROWS)
    assert server.connections == 2
    client.close()


def test_a_connection_that_went_stale_costs_no_try(server: Server) -> None:
    with Client(server.endpoint, retries=None) as client:
        for number in range(3):
            server.script = [answer_and_leave]
            client.predict(ROWS)
            server.wait_for(lambda known=number: server.waiting == known + 1)
    assert server.connections == 3
    assert len(server.requests) == 3


def test_an_answer_that_trickles_has_a_deadline(server: Server, ask: Ask) -> None:
    server.script = [trickle]
    with pytest.raises(ServingError, match="does not answer"):
        ask("predict", ROWS, timeout_s=0.5, retries=None)
    server.wait_for(lambda: server.abandoned == 1)


def test_closing_while_another_thread_waits_lets_it_end(server: Server) -> None:
    server.script = [together(1)]
    client = Client(server.endpoint)
    server.waiting = -1
    thread = threading.Thread(target=client.predict, args=(ROWS,))
    thread.start()
    server.wait_for(lambda: len(server.requests) == 1)
    client.close()
    server._loop.call_soon_threadsafe(server.together.set)
    thread.join()
    assert len(server.counted) == 2
    client.predict(ROWS)
    assert server.connections == 2
    client.close()


def test_a_fork_has_connections_of_its_own(server: Server) -> None:
    code = f"""
import os
from mlops_ray import Client
client = Client({server.endpoint.url + "/v1/models/shop"!r})
client.predict([{{}}])
child = os.fork()
if not child:
    client.predict([{{}}])
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
client.predict([{{}}])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "7"
    assert len(server.counted) == 3
    assert server.connections == 2


def test_a_caller_that_is_cancelled_lets_go(server: Server) -> None:
    server.script = [silent]

    async def run() -> None:
        async with AsyncClient(server.endpoint, hedging=Hedging(after_s=30.0)) as client:
            asked = asyncio.create_task(client.predict(ROWS))
            while not server.requests:
                await asyncio.sleep(0.005)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    server.wait_for(lambda: server.abandoned == 1)


def test_tls(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Server(context=context)
    try:
        with Client(server.endpoint, ca_file=certificate, hedging=Hedging(after_s=5.0)) as client:
            assert client.predict(ROWS).version == 3
        with Client(server.endpoint, verify=False) as client:
            assert client.predict(ROWS).version == 3
        with (
            Client(server.endpoint, retries=QUICK) as client,
            pytest.raises(ServingError, match="certificate"),
        ):
            client.predict(ROWS)
        with pytest.raises(ServingError, match="certificates cannot be used"):
            Client(server.endpoint, ca_file=tmp_path / "missing.pem")
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("address", "model", "expected"),
    [
        ("http://h:1/v1/models/shop", None, "http://h:1/v1/models/shop/predict"),
        ("http://h:1/v1/models/shop/", None, "http://h:1/v1/models/shop/predict"),
        ("http://h:1", "shop", "http://h:1/v1/models/shop/predict"),
        ("https://h/some/where/", "shop", "https://h/some/where/v1/models/shop/predict"),
        ("http://h/v1/models/shop", "other", "http://h/v1/models/other/predict"),
        ("http://h", "a shop", "http://h/v1/models/a%20shop/predict"),
    ],
)
def test_addresses(address: str, model: str | None, expected: str) -> None:
    assert wire.Routes(address, model).predict == expected


@pytest.mark.parametrize("address", ["", "h:1", "ftp://h/v1/models/a", "http://", "http://h:1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ServingError):
        Client(address)


@pytest.mark.parametrize("call", [{}, {"rows": ROWS, "columns": {"amount": [1.0]}}])
def test_what_cannot_be_asked(server: Server, ask: Ask, call: dict[str, Any]) -> None:
    with pytest.raises(ServingError, match="one of them"):
        ask("predict", call=call)
    with pytest.raises(ServingError, match="cannot be written"):
        ask("predict", [{"amount": object()}])
    assert not server.requests


async def answer_and_leave(*args: Any) -> None:
    server, _, writer = args
    await misbehaving.answer(*args)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    server.waiting += 1


async def trickle(*args: Any) -> None:
    for byte in misbehaving.prediction(args[0], args[1]):
        args[2].write(bytes([byte]))
        await asyncio.sleep(0.05)


async def drop_quietly(*args: Any) -> None:
    args[2].close()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for localhost and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    os.chmod(folder / "key.pem", 0o600)
    return folder / "certificate.pem", folder / "key.pem"
