"""What ``exchange`` does in an event loop, done in the threads that call."""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from mlops_ray.serving.client.connection import Connection, left, wait
from mlops_ray.serving.client.hedging import Hedger, Hedging
from mlops_ray.serving.client.retries import Retries, Retrying
from mlops_ray.serving.client.wire import Call, Reply, unreachable


class BlockingExchange:
    """Sends calls over kept connections; for any threads. Takes the arguments of ``Exchange``.

    Args:
        address: Of the endpoint: scheme, host and port.
    """

    def __init__(
        self,
        address: str,
        headers: Mapping[str, str],
        retries: Retries | None,
        hedging: Hedging | None,
        connections: int,
        context: ssl.SSLContext | None,
    ) -> None:
        self._address = address
        self._headers = dict(headers)
        self._retrying = Retrying(retries)
        self._hedger = None if hedging is None else Hedger(hedging)
        self._connections = connections
        self._context = context
        self._pool = _Pool(connections)

    def send(self, call: Call, timeout_s: float) -> Reply:
        """Return the reply to a call; see ``Exchange.send``."""
        deadline_s = time.monotonic() + timeout_s
        self._retrying.begin()
        failures = 0
        while True:
            reply: Reply | None = None
            error: Exception | None = None
            try:
                reply = self._try(call, deadline_s)
            except (OSError, http.client.HTTPException) as caught:
                error = caught
            if reply is not None and not reply.later:
                return reply
            failures += 1
            asked = None if reply is None else reply.retry_after
            left_s = deadline_s - time.monotonic()
            pause_s = self._retrying.pause_s(failures, asked, left_s)
            if pause_s is not None:
                time.sleep(pause_s)
            elif reply is not None:
                return reply
            else:
                assert error is not None
                raise unreachable(call.url, error) from error

    def close(self) -> None:
        """Close the connections that are not in use; the next call opens new ones."""
        pool, self._pool = self._pool, _Pool(self._connections)
        pool.close()

    def _try(self, call: Call, deadline_s: float) -> Reply:
        pool = self._own_pool()
        if not pool.turns.acquire(timeout=left(deadline_s)):
            raise TimeoutError("all connections are in use")
        try:
            if self._hedger is None or not call.hedged:
                return self._first_answer(pool, [self._sent(pool, call, deadline_s)], deadline_s)
            return self._hedged(pool, self._hedger, call, deadline_s)
        finally:
            pool.turns.release()

    def _hedged(self, pool: _Pool, hedger: Hedger, call: Call, deadline_s: float) -> Reply:
        """Return the first answer; the other request's connection is closed."""
        begin_s = time.monotonic()
        after_s = hedger.begin()
        asked = [self._sent(pool, call, deadline_s)]
        if (
            after_s is not None
            and not wait(asked, min(after_s, left(deadline_s)))
            and hedger.allow()
        ):
            # Where it cannot be sent, the first is still under way.
            with suppress(OSError, http.client.HTTPException):
                asked.append(self._sent(pool, call, deadline_s))
        reply = self._first_answer(pool, asked, deadline_s)
        if reply.status == 200:
            hedger.learn(time.monotonic() - begin_s)
        return reply

    def _first_answer(self, pool: _Pool, asked: list[Connection], deadline_s: float) -> Reply:
        """Return the first reply that is an answer; where there is none, the last that came."""
        reply: Reply | None = None
        error: Exception = TimeoutError("no answer in time")
        try:
            while asked:
                begun = asked if len(asked) == 1 else wait(asked, left(deadline_s))
                for connection in list(begun):
                    asked.remove(connection)
                    try:
                        reply = connection.reply(deadline_s)
                    except (OSError, http.client.HTTPException) as caught:
                        connection.close()
                        error = caught
                        continue
                    except BaseException:
                        connection.close()
                        raise
                    pool.give_back(connection)
                    if not reply.later:
                        return reply
        finally:
            for connection in asked:
                connection.close()
        if reply is None:
            raise error
        return reply

    def _sent(self, pool: _Pool, call: Call, deadline_s: float) -> Connection:
        connection = pool.take() or Connection(self._address, self._context)
        try:
            connection.send(call, self._headers, deadline_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def _own_pool(self) -> _Pool:
        pool = self._pool
        if pool.pid != os.getpid():  # a fork must not answer on its parent's connections
            self._pool = pool = _Pool(self._connections)
        return pool


class _Pool:
    """Connections that are not in use, the last used on top; ``turns`` bounds those in use."""

    def __init__(self, connections: int) -> None:
        self.pid = os.getpid()
        self.turns = threading.BoundedSemaphore(connections)
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.is_fresh:
                return connection
            connection.close()

    def give_back(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
