"""Load on an endpoint that sees what breaks: requests at a steady rate, none of them repeated."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlops_ray.metadata.types import Endpoint
from mlops_ray.serving.client.http import AsyncClient

CONNECTIONS = 32
REQUEST_TIMEOUT_S = 60.0


@dataclass
class Load:
    """What became of the requests; times are seconds since the load began.

    ``answered`` has when a request was sent, how long it took, and the version; ``failed`` when it was
    sent, when it failed, and why.
    """

    answered: list[tuple[float, float, int]] = field(default_factory=list)
    failed: list[tuple[float, float, str]] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    def now_s(self) -> float:
        """The time, on the load's clock."""
        return time.monotonic() - self.started_s

    def failed_outside(self, since_s: float, until_s: float) -> list[tuple[float, float, str]]:
        """What failed and was not under way between two moments."""
        return [one for one in self.failed if one[0] > until_s or one[1] < since_s]

    async def run(self, endpoint: Endpoint, row: Any, stop: threading.Event, per_s: float) -> None:
        """Send ``row`` ``per_s`` times a second until ``stop``; return when all are over."""
        async with AsyncClient(
            endpoint, retries=None, connections=CONNECTIONS, timeout_s=REQUEST_TIMEOUT_S
        ) as client:
            sent: list[asyncio.Task[None]] = []
            while not stop.is_set():
                sent.append(asyncio.create_task(self._ask(client, row)))
                await asyncio.sleep(max(0.0, len(sent) / per_s - self.now_s()))
            await asyncio.gather(*sent)

    async def _ask(self, client: AsyncClient, row: Any) -> None:
        sent_s = self.now_s()
        try:
            answer = await client.predict([row])
        except Exception as error:
            self.failed.append((sent_s, self.now_s(), f"{type(error).__name__}: {error}"))
        else:
            self.answered.append((sent_s, self.now_s() - sent_s, answer.version))


@contextmanager
def load(endpoint: Endpoint, row: Any, per_s: float = 100.0) -> Iterator[Load]:
    """Keep load on an endpoint; at the end all requests are over."""
    made, stop = Load(), threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(made.run(endpoint, row, stop, per_s)), daemon=True
    )
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()


def processes(name: str) -> list[int]:
    """The processes of this process's own Ray whose title or program begins with ``name``."""
    parents = {pid: above for pid in _all() if (above := parent(pid)) is not None}
    return [pid for pid in parents if _is_ours(pid, parents) and _program(pid).startswith(name)]


def _all() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def parent(pid: int) -> int | None:
    """The process that has started a process, or taken it over; None where that has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])


def _is_ours(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def _program(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
    return command.split("\0")[0].strip().rpartition("/")[2]
