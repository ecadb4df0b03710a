"""Prefect at the work of the orchestration benchmark; runs in Prefect's environment.

Started with a folder. Each line of stdin is a request, answered with seconds: ["chain", steps],
["fanout", calls], ["cached", steps]. Its own server keeps the runs in SQLite; results are persisted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_THREADS = 16


def settings(folder: str) -> dict[str, str]:
    return {
        "PREFECT_HOME": folder,
        "PREFECT_LOCAL_STORAGE_PATH": f"{folder}/results",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
    }


def flows() -> dict[str, Callable[[int, int], int]]:
    from prefect import flow, task
    from prefect.cache_policies import INPUTS, NO_CACHE, TASK_SOURCE
    from prefect.task_runners import ThreadPoolTaskRunner

    @task(cache_policy=NO_CACHE)
    def numbers(count: int, start: int) -> list[int]:
        return list(range(start, start + count))

    @task(cache_policy=NO_CACHE)
    def add_one(value: int) -> int:
        return value + 1

    @task(cache_policy=NO_CACHE)
    def total(values: list[int]) -> int:
        return sum(values)

    remembered = add_one.with_options(cache_policy=INPUTS + TASK_SOURCE)

    @flow
    def chain(count: int, start: int) -> int:
        value = start
        for _ in range(count):
            value = add_one(value)
        return value

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=_THREADS))
    def fanout(count: int, start: int) -> int:
        made: int = total(add_one.map(numbers(count, start)).result())
        return made

    @flow
    def cached(count: int, start: int) -> int:
        value = 0
        for _ in range(count):
            value = remembered(value)
        return value

    return {"chain": chain, "fanout": fanout, "cached": cached}


def expected(what: str, count: int, start: int) -> int:
    if what == "fanout":
        return sum(range(start + 1, start + count + 1))
    return count + (start if what == "chain" else 0)


def main() -> None:
    os.environ.update(settings(sys.argv[1]))
    known: dict[str, Any] = flows()
    for start, line in enumerate(sys.stdin):
        what, count = json.loads(line)
        began = time.perf_counter()
        made = known[what](count, start)
        seconds = time.perf_counter() - began
        assert made == expected(what, count, start), (what, made)
        print("answer", seconds, flush=True)


if __name__ == "__main__":
    main()
