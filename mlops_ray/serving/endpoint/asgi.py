"""The little of HTTP that an ASGI application needs: a body with a limit, an answer, an error."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from mlops_ray.errors import RequestError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

JSON = b"application/json"


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent back; ``headers`` come beside the content's type and length."""

    body: bytes
    status: int = 200
    kind: bytes = JSON
    headers: Headers = ()


def json_reply(content: Any, status: int = 200, headers: Headers = ()) -> Reply:
    """Return the reply with a JSON value."""
    return Reply(orjson.dumps(content), status, JSON, headers)


async def read_body(receive: Receive, length: int | None, limit: int) -> bytes:
    """Return the body. RequestError 413 as soon as it is, or says it is, over ``limit`` bytes."""
    if length is not None and length > limit:
        raise RequestError(f"the body has {length} bytes; {limit} are allowed", status=413)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client went away", status=400)
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise RequestError(f"the body has more than {limit} bytes", status=413)
        if not chunks and not message.get("more_body", False):
            return bytes(chunk)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def length_of(header: bytes) -> int | None:
    """Return what Content-Length says, None where it says nothing; RequestError 400 beyond 15 digits."""
    if not header.isdigit():
        return None
    if len(header) > 15:
        raise RequestError("Content-Length has too many digits", status=400)
    return int(header)


async def respond(send: Send, reply: Reply, *, head: bool = False) -> None:
    """Send a reply, or only its ``head``."""
    headers = [
        (b"content-type", reply.kind),
        (b"content-length", b"%d" % len(reply.body)),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else reply.body})


def error_content(error: RequestError) -> dict[str, Any]:
    """Return the JSON content of an error's answer."""
    field = None if error.field is None else _encodable(error.field)
    return {"error": {"message": _encodable(error.what), "field": field, "row": error.row}}


def protocol_error_content(error: RequestError) -> dict[str, Any]:
    """Return the same as the Open Inference Protocol wants it: one text."""
    field = "" if error.field is None else f"{_encodable(error.field)}: "
    row = "" if error.row is None else f" (row {error.row})"
    return {"error": f"{field}{_encodable(error.what)}{row}"}


def error_headers(error: RequestError, allow: str = "") -> Headers:
    """Return the headers of an error's answer; ``allow`` names the methods that are possible."""
    headers: list[tuple[bytes, bytes]] = []
    if error.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="mlops-ray"'))
    elif error.status == 403:
        headers.append(
            (b"www-authenticate", b'Bearer realm="mlops-ray", error="insufficient_scope"')
        )
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if allow:
        headers.append((b"allow", allow.encode()))
    return tuple(headers)


def _encodable(text: str) -> str:
    # A message may quote what a client sent, and JSON's \ud800 is a string that UTF-8 cannot hold.
    return text.encode(errors="replace").decode()
