"""The little of HTTP that an ASGI application needs: a body with a limit, an answer, an error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mlops_ray.errors import RequestError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


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
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def respond(send: Send, status: int, body: bytes, allow: str = "") -> None:
    """Send a JSON answer; ``allow`` names the methods that are possible, where another was tried."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if allow:
        headers.append((b"allow", allow.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_content(error: RequestError) -> dict[str, Any]:
    """Return the JSON content of an error's answer."""
    # A message may quote what a client sent, and JSON's \ud800 is a string that UTF-8 cannot hold.
    message = error.what.encode(errors="replace").decode()
    field = None if error.field is None else error.field.encode(errors="replace").decode()
    return {"error": {"message": message, "field": field, "row": error.row}}
