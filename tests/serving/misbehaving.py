"""A server of predictions that misbehaves as told, and keeps account of what reached it."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from mlops_ray.metadata.types import Endpoint

Behaviour = Callable[["Server", "Request", asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at_s: float

    @property
    def ids(self) -> list[str]:
        return json.loads(self.body)["ids"]


@dataclass
class Server:
    """Plays ``script``, one behaviour for each request; after its end, ``answer``."""

    script: list[Behaviour] = field(default_factory=list)
    context: ssl.SSLContext | None = None
    requests: list[Request] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    abandoned: int = 0
    connections: int = 0
    waiting: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live(started)))
        self._thread.start()
        started.wait()

    @property
    def endpoint(self) -> Endpoint:
        scheme = "http" if self.context is None else "https"
        return Endpoint(name="shop", url=f"{scheme}://localhost:{self.port}", versions={})

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def wait_for(self, true: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 30
        while not true():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    async def _live(self, started: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self.together = asyncio.Event()
        server = await asyncio.start_server(self._serve, "localhost", 0, ssl=self.context)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._over.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                request = await self._read(reader)
                self.requests.append(request)
                play = self.script.pop(0) if self.script else answer
                task = asyncio.create_task(play(self, request, writer))
                gone = asyncio.create_task(self._left(reader))
                await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
                gone.cancel()
                if not task.done():
                    task.cancel()
                    self.abandoned += 1
                    return
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _left(self, reader: asyncio.StreamReader) -> None:
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.005)

    async def _read(self, reader: asyncio.StreamReader) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(method, path, headers, body, time.monotonic())


def reply(status: int, content: Any, **headers: str) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body


def prediction(server: Server, request: Request) -> bytes:
    """Count the rows, and predict one half for each."""
    ids = request.ids
    server.counted.update(ids)
    content = {"model": "shop", "version": 3, "route": "champion", "ids": ids}
    return reply(200, content | {"scores": [0.5] * len(ids), "labels": [1] * len(ids)})


async def answer(server: Server, request: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(prediction(server, request))


async def drop(server: Server, request: Request, writer: asyncio.StreamWriter) -> None:
    """Do the work, and hang up instead of answering."""
    prediction(server, request)
    writer.close()


async def half(server: Server, request: Request, writer: asyncio.StreamWriter) -> None:
    """Do the work, and hang up in the middle of the answer."""
    whole = prediction(server, request)
    writer.write(whole[: len(whole) - 20])
    await writer.drain()
    writer.close()


async def silent(server: Server, request: Request, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


def later(status: int, retry_after: str | None = None) -> Behaviour:
    async def behave(server: Server, request: Request, writer: asyncio.StreamWriter) -> None:
        headers = {} if retry_after is None else {"Retry_After": retry_after}
        error = {"message": "too busy", "field": None, "row": None}
        writer.write(reply(status, {"error": error}, **headers))

    return behave


def says(status: int, content: Any, **headers: str) -> Behaviour:
    async def behave(server: Server, request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(status, content, **headers))

    return behave


def together(count: int) -> Behaviour:
    """Answer when so many requests are there at the same time."""

    async def behave(server: Server, request: Request, writer: asyncio.StreamWriter) -> None:
        server.waiting += 1
        if server.waiting == count:
            server.together.set()
        await server.together.wait()
        await answer(server, request, writer)

    return behave
