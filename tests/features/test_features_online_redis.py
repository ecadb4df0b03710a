"""What is special about the online store in a Redis server: it can be gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from features.online_samples import TYPED, declare, get, keys, put, row, table
from redis_server import RedisServer, serve

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.online import NOT_FOUND, PRESENT, Cursor, OnlineStore, open_online

ABSENT = [NOT_FOUND] * len(TYPED)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    yield from serve(tmp_path)


def declared(server: RedisServer, **more: Any) -> Features:
    return declare(store="redis", url=server.url, **({"timeout": "0.3s"} | more))


def opened(features: Features, project: str = "p", readonly: bool = False) -> OnlineStore:
    return open_online(features, Path("unused"), project, readonly)


def test_a_server_that_is_gone_is_an_error_and_comes_back(server: RedisServer) -> None:
    features = declared(server)
    store = opened(features)
    put(store, features, row(100))
    server.stop(hard=True)
    for call in (
        lambda: get(store, 100),
        lambda: put(store, features, row(101)),
        lambda: store.cursor("thing"),
        lambda: store.move_cursor("thing", Cursor()),
        lambda: store.replace("thing", [], Cursor()),
        store.clear,
    ):
        with pytest.raises(FeatureStoreError, match="does not answer") as caught:
            call()
        assert str(server.port) in str(caught.value)
        assert "features.online.url" in caught.value.fix
    server.start()
    assert get(store, 100)[1] == [PRESENT] * len(TYPED)
    assert put(store, features, row(101, price=9.0)) == 1
    assert get(store, 101)[0]["price"] == 9.0


def test_a_batch_that_does_not_arrive_leaves_the_store_usable(server: RedisServer) -> None:
    features = declared(server)
    store = opened(features)

    def write() -> None:
        with store.batch():
            put(store, features, row(100))
            store.move_cursor("thing", Cursor("t", 1))
            server.stop()

    with pytest.raises(FeatureStoreError, match="does not answer"):
        write()
    server.start()
    assert get(store, 100)[1] == ABSENT
    assert store.cursor("thing") is None
    with store.batch():
        put(store, features, row(100))
    assert get(store, 100)[1] == [PRESENT] * len(TYPED)


def test_reads_may_do_without_a_server_and_do_not_wait_for_it_each_time(
    server: RedisServer,
) -> None:
    features = declared(server, on_failure="missing", timeout="1s")
    store = opened(features)
    put(store, features, row(100))
    reader = opened(features, readonly=True).reader(["plain", "thing"])
    asked = [[np.array([1, 2])], keys(("north", 1), ("north", 2))]
    server.freeze()
    waited = []
    for _ in range(4):
        began = time.monotonic()
        matrix, statuses = reader.read(asked, np.array([100, 100]))
        waited.append(time.monotonic() - began)
        assert (statuses == NOT_FOUND).all()
        assert np.isnan(matrix).all()
    assert sum(wait > 0.5 for wait in waited) == 1
    with pytest.raises(FeatureStoreError, match="does not answer"):
        put(store, features, row(101))
    server.thaw()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        _, statuses = reader.read(asked, np.array([200, 200]))
        if (statuses[0, 2:] == PRESENT).all():
            break
        time.sleep(0.05)
    assert statuses[0].tolist() == [NOT_FOUND] * 2 + [PRESENT] * 3


def test_a_late_answer_is_not_taken_for_the_next_one(server: RedisServer) -> None:
    features = declared(server)
    store = opened(features)
    put(store, features, *[row(100, key=("a", shelf), price=float(shelf)) for shelf in range(9)])
    server.freeze()
    with pytest.raises(FeatureStoreError, match="does not answer"):
        get(store, 100, ("a", 1))
    with pytest.raises(FeatureStoreError, match="does not answer"):
        put(store, features, row(100, key=("a", 2), price=20.0))
    server.thaw()
    for shelf in (3, 4, 5):
        assert get(store, 100, ("a", shelf))[0]["price"] == float(shelf)


def test_what_is_written_during_a_replacement_stays(server: RedisServer) -> None:
    features = declared(server)
    store, other = opened(features), opened(features)

    def tables() -> Iterator[Any]:
        yield table(features, "thing", [row(7, price=7.0), row(8, key=("b", 1))])
        put(other, features, row(50, price=50.0), row(1, key=("b", 1), price=0.0))
        put(other, features, row(3, key=("c", 1), price=3.0))
        yield table(features, "thing", [row(9, price=9.0)])

    store.replace("thing", tables(), Cursor("t", 1))
    assert get(store, 1000)[0]["price"] == 50.0
    assert get(store, 1000, ("b", 1))[0]["price"] == 1.5
    assert get(store, 1000, ("c", 1))[0]["price"] == 3.0


def test_of_two_replacements_the_later_stands(server: RedisServer) -> None:
    features = declared(server)
    store, other = opened(features), opened(features)

    def tables() -> Iterator[Any]:
        yield table(features, "thing", [row(7, price=7.0)])
        other.replace("thing", [table(features, "thing", [row(1, price=1.0)])], Cursor("t", 2))
        yield table(features, "thing", [row(9, price=9.0)])

    with pytest.raises(FeatureStoreError, match="another process fills view 'thing'"):
        store.replace("thing", tables(), Cursor("t", 1))
    assert get(store, 1000)[0]["price"] == 1.0
    cursor = store.cursor("thing")
    assert cursor is not None
    assert (cursor.table, cursor.version) == ("t", 2)


def test_a_cleared_or_replaced_project_leaves_no_key_behind(server: RedisServer) -> None:
    import redis

    features = declared(server)
    store = opened(features)
    raw = redis.Redis(port=server.port)
    put(store, features, row(100))

    def dies() -> Iterator[Any]:
        yield table(features, "thing", [row(7)])
        raise KeyError

    with pytest.raises(KeyError):
        store.replace("thing", dies(), Cursor())
    assert any(b":fill:" in key for key in raw.keys())  # noqa: SIM118
    store.replace("thing", [table(features, "thing", [row(7)])], Cursor())
    assert not any(b":fill:" in key for key in raw.keys())  # noqa: SIM118
    with pytest.raises(KeyError):
        store.replace("thing", dies(), Cursor())
    put(opened(features, "q"), features, row(1))
    store.clear()
    assert raw.keys("p:*") == []
    assert len(raw.keys("q:*")) == 3


def test_what_the_server_refuses_is_said(server: RedisServer) -> None:
    import redis

    features = declared(server)
    store = opened(features)
    raw = redis.Redis(port=server.port)
    put(store, features, row(100))
    raw.config_set("maxmemory", "1")
    with pytest.raises(FeatureStoreError, match=r"(?s)refused a command.*memory"):
        put(store, features, row(101))

    def batch() -> None:
        with store.batch():
            put(store, features, row(101))

    with pytest.raises(FeatureStoreError, match=r"(?s)refused a command.*memory"):
        batch()
    assert get(store, 200)[1] == [PRESENT] * len(TYPED)
    raw.config_set("maxmemory", "0")
    assert put(store, features, row(101)) == 1
    raw.set(raw.keys("p:thing:*")[0], b"text")
    with pytest.raises(FeatureStoreError, match="WRONGTYPE"):
        get(store, 200)
    reader = store.reader(["thing", "thing"])
    with pytest.raises(FeatureStoreError, match="WRONGTYPE"):
        reader.read([keys(("north", 1))] * 2, np.array([1]))
    with pytest.raises(FeatureStoreError, match="no URL of a Redis server"):
        opened(declare(store="redis", url="http://localhost"))


def test_many_threads_read_and_write_at_once(server: RedisServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    features = declared(server, timeout="10s")
    store = opened(features)
    put(store, features, *[row(0, key=("a", shelf), stock=shelf) for shelf in range(50)])

    def work(number: int) -> None:
        reader, writer = store.reader(["thing"]), opened(features)
        for turn in range(30):
            shelf = (number * 7 + turn) % 50
            put(writer, features, row(turn, key=("a", shelf), stock=shelf))
            found, _ = reader.read_table([keys(("a", shelf), ("a", 49 - shelf))], np.full(2, 99))
            assert found["thing__stock"].to_pylist() == [shelf, 49 - shelf]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_a_refusal_is_an_error_also_where_reads_may_do_without_a_server(
    server: RedisServer,
) -> None:
    import redis

    features = declared(server, on_failure="missing")
    put(opened(features), features, row(100))
    raw = redis.Redis(port=server.port)
    raw.config_set("requirepass", "secret")
    with pytest.raises(FeatureStoreError, match=r"(?s)refused the user.*user:password@"):
        get(opened(features), 200)
    wrong = declare(
        store="redis", url=f"redis://:wrong@127.0.0.1:{server.port}", on_failure="missing"
    )
    with pytest.raises(FeatureStoreError, match="refused the user"):
        get(opened(wrong), 200)
    raw.auth("secret")
    raw.config_set("requirepass", "")
    raw.set(raw.keys("p:thing:*")[0], b"text")
    with pytest.raises(FeatureStoreError, match="WRONGTYPE"):
        get(opened(features), 200)


def test_a_server_that_goes_between_rows_and_their_layout(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = declared(server)
    put(opened(old), old, row(100))
    new = declare({**TYPED, "more": "int"}, store="redis", url=server.url, on_failure="missing")
    store = opened(new)
    fetch = type(store)._get  # type: ignore[attr-defined]

    def last_answer(self: Any, *arguments: Any) -> Any:
        found = fetch(self, *arguments)
        server.stop(hard=True)
        return found

    monkeypatch.setattr(type(store), "_get", last_answer)
    reader = store.reader(["thing"])
    for _ in range(2):
        assert (reader.read([keys(("north", 1))], np.array([200]))[1] == NOT_FOUND).all()
    server.start()
    with pytest.raises(FeatureStoreError, match="does not answer"):
        get(opened(declare({**TYPED, "more": "int"}, store="redis", url=server.url)), 200)


def test_a_cursor_that_moves_meanwhile_is_not_moved_back(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = declared(server)
    store, other = opened(features), opened(features)
    store.move_cursor("thing", Cursor("t", 5, 5))
    read = type(store)._cursor_content  # type: ignore[attr-defined]
    late = [Cursor("t", 9, 9)]

    def then_moved(self: Any, view: str) -> bytes:
        content: bytes = read(self, view)
        if late and self is store:
            other.move_cursor(view, late.pop())
        return content

    monkeypatch.setattr(type(store), "_cursor_content", then_moved)
    assert store.move_cursor("thing", Cursor("t", 6, 6))
    assert store.cursor("thing") == Cursor("t", 9, 9)
    other.replace("thing", [], Cursor("t", 9))
    late.append(Cursor("t", 10))
    assert not store.move_cursor("thing", Cursor("t", 11))
