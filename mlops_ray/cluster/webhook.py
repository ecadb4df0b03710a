"""Signed HTTP requests that fire triggers: ``POST /hooks/<trigger>``."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import threading
from collections.abc import Callable, Collection
from typing import Any

from aiohttp import web

from mlops_ray.config.triggers import Webhook
from mlops_ray.errors import ClusterError, LedgerError

SIGNATURE = "X-Hub-Signature-256"
DELIVERIES = ("X-GitHub-Delivery", "X-Delivery-Id")

_DELIVERY = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_EVENT = "X-GitHub-Event"

Deliver = Callable[[str, str, Any, dict[str, str]], bool]


class WebhookServer:
    """An HTTP server in a thread of its own.

    A request has a JSON body, its signature (``sha256=`` and the HMAC-SHA256 of the body in
    hexadecimal) and an id of the delivery. Answers: 202 accepted, on disk; 200 known already; 400
    no JSON or no id; 401 wrong signature; 404 no such webhook; 413 too long; 503 try again later.

    Args:
        webhook: Where to listen, and how long a body may be.
        secret: What requests are signed with.
        names: The triggers that can be fired.
        deliver: Takes trigger, id of the delivery, payload and what the sender calls the event;
            returns whether the delivery is new. Durable on return.
    """

    def __init__(
        self, webhook: Webhook, secret: str, names: Collection[str], deliver: Deliver
    ) -> None:
        self._webhook = webhook
        self._secret = secret.encode()
        self._names = names
        self._deliver = deliver
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(self._application(), access_log=None)
        self._thread = threading.Thread(target=self._loop.run_forever, name="webhook", daemon=True)

    def start(self) -> str:
        """Listen from now on; return the address of the hooks, to which a trigger's name is added.

        Raises:
            ClusterError: The port is taken, or the host is not one of this machine's.
        """
        self._thread.start()
        try:
            return self._call(self._listen())
        except OSError as error:
            self.close()
            raise ClusterError(
                "the webhook server cannot listen",
                where=f"{self._webhook.host}:{self._webhook.port}",
                why=str(error),
                fix="set webhook.port to a free port",
            ) from error

    def close(self) -> None:
        """Stop listening; requests under way are answered."""
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._webhook.host, self._webhook.port).start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}/hooks/"

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=self._webhook.body_bytes)
        application.router.add_post("/hooks/{trigger}", self._receive)
        return application

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        if not self._is_signed(body, request.headers.get(SIGNATURE, "")):
            return _answer(401, f"the header {SIGNATURE} does not sign this body")
        name = request.match_info["trigger"]
        if name not in self._names:
            return _answer(404, f"there is no webhook {name!r}")
        event = request.headers.get(_EVENT, "")
        if event == "ping":
            return _answer(200, "pong")
        delivery = next((request.headers[h] for h in DELIVERIES if h in request.headers), "")
        if not _DELIVERY.fullmatch(delivery):
            return _answer(400, f"give the delivery an id in the header {' or '.join(DELIVERIES)}")
        try:
            payload = json.loads(body or b"null")
        except (ValueError, RecursionError):
            return _answer(400, "the body is not JSON, or nested too deep")
        told = {"event": event} if event else {}
        try:
            new = await asyncio.to_thread(self._deliver, name, delivery, payload, told)
        except (ClusterError, LedgerError) as error:
            return _answer(503, error.what)
        return _answer(202, "accepted") if new else _answer(200, "known already")

    def _is_signed(self, body: bytes, signature: str) -> bool:
        wanted = "sha256=" + hmac.new(self._secret, body, hashlib.sha256).hexdigest()
        return hmac.compare_digest(wanted.encode(), signature.encode(errors="surrogateescape"))


def _answer(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)
