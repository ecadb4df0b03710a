"""Short forms of the faults of the online store; each module says how to run the long one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import kill_materialize, redis_outage
from redis_server import RedisServer, serve


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    yield from serve(tmp_path)


def test_killed_materialisations_lose_and_invent_nothing_in_lmdb(tmp_path: Path) -> None:
    kill_materialize.run(tmp_path, 4, rows=8_000)


def test_killed_materialisations_lose_and_invent_nothing_in_redis(
    tmp_path: Path, server: RedisServer
) -> None:
    kill_materialize.run(tmp_path, 4, server.url, rows=8_000)


def test_a_server_that_goes_and_comes_loses_nothing_acknowledged(server: RedisServer) -> None:
    redis_outage.run(server, 0.8)
