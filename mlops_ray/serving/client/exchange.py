"""One call, from its first try to its answer: tries, pauses, a second request beside a slow one."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlops_ray.errors import ServingError
from mlops_ray.serving.client.connection import DEADLINE_HEADER, milliseconds
from mlops_ray.serving.client.hedging import Hedger, Hedging
from mlops_ray.serving.client.retries import Retries, Retrying
from mlops_ray.serving.client.wire import Call, Reply, unreachable

_KEEPALIVE_S = 60.0


class Exchange:
    """Sends calls over kept connections; belongs to the event loop in which it is first used.

    Args:
        headers: Go with each request.
        retries: None tries each call just once.
        hedging: None never sends a second request beside the first.
        connections: How many requests are under way at once; the others wait for their turn.
        context: For TLS.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        retries: Retries | None,
        hedging: Hedging | None,
        connections: int,
        context: ssl.SSLContext | None,
    ) -> None:
        self._headers = headers
        self._retrying = Retrying(retries)
        self._hedger = None if hedging is None else Hedger(hedging)
        self._connections = connections
        self._context = context
        self._session: Any = None
        self._turns = asyncio.Semaphore(connections)

    async def send(self, call: Call, timeout_s: float) -> Reply:
        """Return the reply to a call: what the endpoint answered, whatever its status.

        A reply that says "later" comes back when the tries, the time or the budget are used up.

        Raises:
            ServingError: There is no answer within ``timeout_s``, all tries together.
        """
        deadline_s = _now_s() + timeout_s
        self._retrying.begin()
        failures = 0
        while True:
            reply, error = await self._settled(call, deadline_s)
            if reply is not None and not reply.later:
                return reply
            failures += 1
            asked = None if reply is None else reply.retry_after
            left_s = deadline_s - _now_s()
            pause_s = self._retrying.pause_s(failures, asked, left_s)
            if pause_s is not None:
                await asyncio.sleep(pause_s)
            elif reply is not None:
                return reply
            else:
                assert error is not None
                raise unreachable(call.url, error) from error

    async def close(self) -> None:
        """Close all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _settled(
        self, call: Call, deadline_s: float
    ) -> tuple[Reply | None, Exception | None]:
        """Return the reply of one try, or why there is none."""
        from aiohttp import ClientError

        try:
            return await self._try(call, deadline_s), None
        except (ClientError, OSError) as error:  # a timeout is an OSError
            return None, error

    async def _try(self, call: Call, deadline_s: float) -> Reply:
        hedger = self._hedger
        if hedger is None or not call.hedged:
            return await self._request(call, deadline_s)
        begin_s = _now_s()
        after_s = hedger.begin()
        if after_s is None:
            reply = await self._request(call, deadline_s)
        else:
            reply = await self._hedged(hedger, call, deadline_s, after_s)
        if reply.status == 200:
            hedger.learn(_now_s() - begin_s)
        return reply

    async def _hedged(self, hedger: Hedger, call: Call, deadline_s: float, after_s: float) -> Reply:
        """Return the first answer; the other request is cancelled, and its connection closed."""
        tasks = [asyncio.create_task(self._request(call, deadline_s))]
        try:
            await asyncio.wait(tasks, timeout=after_s)
            if not tasks[0].done() and hedger.allow():
                tasks.append(asyncio.create_task(self._request(call, deadline_s)))
            return await _first_answer(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _request(self, call: Call, deadline_s: float) -> Reply:
        session, turns = self._opened(), self._turns
        async with asyncio.timeout_at(deadline_s):
            await turns.acquire()
        try:
            return await self._sent(session, call, deadline_s)
        finally:
            turns.release()

    async def _sent(self, session: Any, call: Call, deadline_s: float) -> Reply:
        import aiohttp

        # What the endpoint is told does not count the wait for a turn.
        left_s = deadline_s - _now_s()
        if left_s <= 0:
            raise TimeoutError("no time is left")
        headers = {**self._headers, **call.headers, DEADLINE_HEADER: milliseconds(left_s)}
        async with session.request(
            call.method,
            call.url,
            data=call.body,
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=left_s),
        ) as response:
            return Reply(
                response.status,
                await response.read(),
                response.headers.get("Content-Type", ""),
                response.headers.get("Retry-After"),
            )

    def _opened(self) -> Any:
        if self._session is None:
            import aiohttp

            self._turns = asyncio.Semaphore(self._connections)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=self._connections,
                    keepalive_timeout=_KEEPALIVE_S,
                    ssl=self._context if self._context is not None else True,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            )
        return self._session


def tls_context(secure: bool, verify: bool, ca_file: Path | str | None) -> ssl.SSLContext | None:
    """Return how to check the endpoint's certificate; None where it speaks no TLS.

    Raises:
        ServingError: ``ca_file`` cannot be read.
    """
    if not secure:
        return None
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ServingError(
            "the file of certificates cannot be used",
            where=str(ca_file),
            why=str(error),
            fix="give a PEM file with the certificate that signed the endpoint's",
        ) from error
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _first_answer(tasks: list[asyncio.Task[Reply]]) -> Reply:
    """Return the first reply that is an answer; where there is none, what the first task says."""
    pending: set[asyncio.Task[Reply]] = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.exception() is None and not task.result().later:
                return task.result()
    return tasks[0].result()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
