"""The HTTP door of pushed sources: what it takes, what it refuses, and what becomes of the events."""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from serving.harness import free_port

from mlops_ray.config.features import Features
from mlops_ray.config.serving import Serving
from mlops_ray.errors import FeatureStoreError, RequestError, ServingError
from mlops_ray.features.columns import INSTANT
from mlops_ray.features.store import FeatureStore
from mlops_ray.metadata.home import Home
from mlops_ray.orchestration.context import Context
from mlops_ray.serving import push
from mlops_ray.serving.deployment import runtime
from mlops_ray.serving.deployment.deploy import remove
from mlops_ray.serving.steps import push_endpoint

ARROW = {"content-type": "application/vnd.apache.arrow.stream"}
OFFSETS, BROKEN = struct.pack("<3i", 0, 8, 16), struct.pack("<3i", 0, 0x70000000, 16)
PATH = "/v1/features/clicks/events"
EVENT = {"user": "anna", "item": 7, "price": 1.5, "new": True, "at": "2024-03-01T12:00:00Z"}


def declare() -> Features:
    columns = {"user": "string", "item": "int", "price": "float", "new": "bool", "at": "timestamp"}
    return Features.model_validate(
        {
            "sources": {"clicks": {"push": columns}, "other": {"path": "x", "available_at": "at"}},
            "entities": {"user": {"keys": {"user": "string"}}},
            "views": {
                "last_click": {
                    "entity": "user",
                    "source": "clicks",
                    "event_time": "at",
                    "columns": {"item": "int", "price": "float", "new": "bool"},
                }
            },
            "services": {
                "s": {
                    "views": ["last_click"],
                    "inputs": {"user": {"dtype": "string"}, "at": {"dtype": "timestamp"}},
                    "time": "at",
                }
            },
            "labels": {
                "source": "other", "id": "id", "time": "at", "label": "y", "known_at": "at",
            },
        }
    )  # fmt: skip


class Door:
    """The application in this process; ``taken`` is what it stored."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, pa.Table]] = []
        self.fails: Exception | None = None
        self.app = push.PushDoor(push.pushed_columns(declare()), 2000, self.store)

    async def store(self, source: str, events: pa.Table) -> int:
        if self.fails is not None:
            raise self.fails
        self.taken.append((source, events))
        return events.num_rows

    def __call__(
        self, body: Any, path: str = PATH, method: str = "POST", **headers: str
    ) -> tuple[int, Any, dict[bytes, bytes]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
        pieces = [data[:10], data[10:]]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        asyncio.run(self.app(scope, receive, send))
        return sent[0]["status"], json.loads(sent[1]["body"]), dict(sent[0]["headers"])


@pytest.fixture
def door() -> Door:
    return Door()


def arrow(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def test_rows_of_json_are_typed_and_counted(door: Door) -> None:
    status, content, _ = door({"rows": [EVENT, {"user": None, "price": 2}]})
    assert (status, content) == (202, {"accepted": 2})
    ((source, table),) = door.taken
    assert source == "clicks"
    assert table.schema.field("at").type == INSTANT
    assert table["item"].to_pylist() == [7, None]
    assert table["price"].to_pylist() == [1.5, 2.0]


def test_an_arrow_stream_is_taken_as_it_is(door: Door) -> None:
    table = pa.table({"user": ["a", "b"], "item": [2**53 + 1, None], "price": [math.nan, None]})
    status, content, _ = door(arrow(table), content_type=ARROW["content-type"])
    assert (status, content) == (202, {"accepted": 2})
    taken = door.taken[0][1]
    assert taken["item"].to_pylist() == [2**53 + 1, None]
    assert math.isnan(taken["price"][0].as_py())
    assert taken["price"][1].as_py() is None


@pytest.mark.parametrize(
    ("rows", "field", "row"),
    [
        ([EVENT, EVENT | {"item": "7"}], "item", 1),
        ([EVENT | {"item": 1.5}], "item", 0),
        ([EVENT | {"item": 2**64}], "item", 0),
        ([EVENT, EVENT, EVENT | {"prise": 1}], "prise", 2),
        ([EVENT | {"at": "yesterday"}], "at", 0),
        ([EVENT | {"new": 1}], "new", 0),
        ([EVENT, 5], None, 1),
        ([], "rows", None),
        ({}, "rows", None),
    ],
)
def test_a_wrong_event_is_named_by_field_and_row(
    door: Door, rows: Any, field: str | None, row: int | None
) -> None:
    status, content, _ = door({"rows": rows})
    assert status == 422, content
    assert (content["error"]["field"], content["error"]["row"]) == (field, row)
    assert door.taken == []


def test_a_wrong_column_of_arrow_is_named(door: Door) -> None:
    status, content, _ = door(
        arrow(pa.table({"user": [1]})), content_type=ARROW["content-type"] + "; charset=x"
    )
    assert (status, content["error"]["field"]) == (422, "user")


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b'{"rows": [{"price": NaN}]}', {}, 400),
        (b"not arrow", {"content_type": ARROW["content-type"]}, 400),
        (b" " * 3000, {}, 413),
        (b"{}", {"content_length": "99999"}, 413),
        ([EVENT], {}, 422),
        ({"rows": [EVENT], "source": "clicks"}, {}, 422),
    ],
)
def test_bodies_that_are_refused(door: Door, body: Any, headers: Any, status: int) -> None:
    assert door(body, **headers)[0] == status
    assert door.taken == []


@pytest.mark.parametrize("path", ["/v1/features/clicks", "/v1/features/other/events", "/x"])
def test_there_is_nothing_elsewhere(door: Door, path: str) -> None:
    assert door({"rows": [EVENT]}, path)[0] == 404


def test_only_post_is_possible(door: Door) -> None:
    status, _, headers = door(b"", method="GET")
    assert (status, headers[b"allow"]) == (405, b"POST")


def test_what_could_not_be_stored_is_to_be_sent_again(door: Door) -> None:
    door.fails = FeatureStoreError("the disk is full")
    status, content, _ = door({"rows": [EVENT]})
    assert status == 503
    assert "send them again" in content["error"]["message"]


def test_what_the_writer_refuses_is_the_senders_matter(door: Door) -> None:
    door.fails = RequestError("amount 99", field="price", row=0)
    status, content, _ = door({"rows": [EVENT]})
    assert (status, content["error"]["field"]) == (422, "price")


@pytest.mark.parametrize("damage", [(b"abcdefgh", b"\xffbcdefgh"), (OFFSETS, BROKEN)])
def test_broken_buffers_are_refused(door: Door, damage: tuple[bytes, bytes]) -> None:
    body = arrow(pa.table({"user": ["abcdefgh", "ijklmnop"]}))
    assert damage[0] in body
    status, content, _ = door(body.replace(*damage), content_type=ARROW["content-type"])
    assert (status, door.taken) == (400, []), content


@pytest.mark.parametrize(
    ("table", "options", "field"),
    [
        (pa.table({"item": [0] * 100_000}), pa.ipc.IpcWriteOptions(compression="zstd"), None),
        (pa.table({"item": [0] * 10_000}), pa.ipc.IpcWriteOptions(compression="lz4"), None),
        (pa.table({"item": pa.nulls(10**9)}), None, "item"),
        (pa.table({"user": pa.array(["a"] * 9).dictionary_encode()}), None, "user"),
        (pa.table({"item": [[1], [2]]}), None, "item"),
    ],
)
def test_what_is_larger_than_it_looks_is_refused(
    door: Door, table: pa.Table, options: Any, field: str | None
) -> None:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    status, content, _ = door(sink.getvalue(), content_type=ARROW["content-type"])
    assert (status, door.taken) == (422, []), content
    assert content["error"].get("field") == field


# On a cluster.


def post(url: str, body: Any, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, given)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def opened(
    ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Home]]:
    from mlops_ray.features.push import stop_writer

    home = Home(tmp_path_factory.mktemp("push") / "home")
    found = runtime.running()
    serving = Serving(port=found[0] if found else free_port(), max_body_bytes=100_000)
    endpoint = push_endpoint(Context("clicking", home), "clicking", serving, declare())
    yield endpoint.url, home
    remove(endpoint.name)
    stop_writer("clicking")


def test_events_over_http_are_features_at_once(opened: tuple[str, Home]) -> None:
    url, home = opened
    events = [EVENT, EVENT | {"item": 8, "at": "2024-03-01T12:00:01Z"}]
    assert post(f"{url}{PATH}", {"rows": events}) == (202, {"accepted": 2})
    store = FeatureStore(declare(), home, "clicking")
    found = {value.feature: value.value for value in store.get("last_click", {"user": "anna"})}
    assert found == {"item": 8, "price": 1.5, "new": True}
    table = pa.table({"user": ["björn"], "item": [2**53 + 1], "at": pa.array([0], INSTANT)})
    assert post(f"{url}{PATH}", arrow(table), **{"content_type": ARROW["content-type"]})[0] == 202
    found = {value.feature: value.value for value in store.get("last_click", {"user": "björn"})}
    assert found == {"item": 2**53 + 1, "price": None, "new": None}


def test_a_wrong_event_over_http(opened: tuple[str, Home]) -> None:
    status, content = post(f"{opened[0]}{PATH}", {"rows": [EVENT, EVENT | {"new": "yes"}]})
    assert status == 422
    assert (content["error"]["field"], content["error"]["row"]) == ("new", 1)


def test_a_killed_writer_comes_back_with_all_that_was_accepted(opened: tuple[str, Home]) -> None:
    import ray

    from mlops_ray.features.push import find_writer

    url, home = opened
    assert post(f"{url}{PATH}", {"rows": [EVENT | {"user": "carla", "item": 1}]})[0] == 202
    ray.kill(find_writer("clicking"), no_restart=False)
    deadline = time.monotonic() + 60
    while True:
        status, _ = post(f"{url}{PATH}", {"rows": [EVENT | {"user": "dora", "item": 2}]})
        if status == 202:
            break
        assert status == 503
        assert time.monotonic() < deadline
        time.sleep(0.3)
    store = FeatureStore(declare(), home, "clicking")
    for user, item in (("carla", 1), ("dora", 2)):
        assert store.get("last_click", {"user": user})[0].value == item


def test_a_project_without_pushed_sources(home: Home, tmp_path: Path) -> None:
    features = declare()
    sources = {"clicks": features.sources["other"], "other": features.sources["other"]}
    plain = features.model_copy(update={"sources": sources})
    with pytest.raises(ServingError, match="no source takes pushed events"):
        push_endpoint(Context("clicking", home), "clicking", Serving(), plain)
