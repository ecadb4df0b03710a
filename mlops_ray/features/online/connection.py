"""Calls of a Redis server, with errors that say what to do."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.online.failures import ServerGoneError

Command = tuple[Any, ...]

_IN_FLIGHT = 4
_UNKNOWN_USER = (
    redis.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)


class RedisServer:
    """A Redis server behind connections that are used again, safe for threads.

    Commands are sent without redis-py's pool and command layer, which take longer than the server
    does. Every method raises ``FeatureStoreError`` when the server refuses, and ``ServerGoneError``
    when it does not answer within ``timeout_s``; what it did then is not known.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        try:
            pool = redis.ConnectionPool.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # Whether a call may be repeated, and when, is its caller's to know.
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise FeatureStoreError(
                "this is no URL of a Redis server",
                where="features.online.url",
                why=str(error),
                fix="write redis://host:6379/0, rediss:// for TLS, or unix:///path",
            ) from error
        self._idle: deque[Any] = deque()
        self._process = os.getpid()
        self._connect = partial(pool.connection_class, **pool.connection_kwargs)
        place = pool.connection_kwargs
        self.address = place.get("path") or f"{place.get('host')}:{place.get('port', 6379)}"

    def call(self, command: Command) -> Any:
        """Return the answer to a command."""
        # The path of a request: without ``_connection``, which takes as long as the server.
        connection = self._take()
        try:
            connection.send_packed_command([hiredis.pack_command(command)], check_health=False)
            answer = connection.read_response()
        except BaseException as error:
            connection.disconnect()
            if isinstance(error, redis.RedisError):
                raise self._error(error) from error
            raise
        self._idle.append(connection)
        return answer

    def transaction(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands that are run together, in one round trip."""
        with self._connection() as connection:
            framed = [(b"MULTI",), *commands, (b"EXEC",)]
            connection.send_packed_command([b"".join(map(hiredis.pack_command, framed))])
            refused = None
            for _ in framed[:-1]:
                try:
                    connection.read_response()
                except redis.ResponseError as error:
                    refused = refused or error
            if refused is not None:
                raise refused
            answers: list[Any] = connection.read_response()
        for answer in answers:
            if isinstance(answer, redis.ResponseError):
                raise self._error(answer)
        return answers

    def stream(self, commands: Iterable[Command]) -> Iterator[Any]:
        """Yield the answer to each command; a few are on their way at any time."""
        with self._connection() as connection:
            waiting = 0
            for command in commands:
                connection.send_packed_command([hiredis.pack_command(command)])
                waiting += 1
                if waiting >= _IN_FLIGHT:
                    yield connection.read_response()
                    waiting -= 1
            for _ in range(waiting):
                yield connection.read_response()

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        connection = self._take()
        try:
            yield connection
        except BaseException as error:
            # Answers that were not read would be taken for those to the next call.
            connection.disconnect()
            if isinstance(error, redis.RedisError):
                raise self._error(error) from error
            raise
        self._idle.append(connection)

    def _take(self) -> Any:
        """Return a connection that no other thread uses; it connects at its first command."""
        if self._process != os.getpid():
            # A forked process must not answer its parent's calls.
            self._process, self._idle = os.getpid(), deque()
        try:
            connection = self._idle.pop()
        except IndexError:
            return self._connect()
        _forget_ended(connection)
        return connection

    def _error(self, error: Exception) -> FeatureStoreError:
        where, why = f"Redis at {self.address}", str(error)
        if isinstance(error, _UNKNOWN_USER):
            return FeatureStoreError(
                "the online store refused the user",
                where=where,
                why=why,
                fix="give one that may do this: features.online.url=redis://user:password@host:6379/0",
            )
        if isinstance(error, redis.ConnectionError | redis.TimeoutError):
            return ServerGoneError(
                "the online store does not answer",
                where=where,
                why=why,
                fix="see that the server runs and features.online.url is right; then run it again",
            )
        return FeatureStoreError(
            "the online store refused a command",
            where=where,
            why=why,
            fix="see the server's log: it may be out of memory, or read-only",
        )


def _forget_ended(connection: Any) -> None:
    """Close a connection that its server ended; it then connects again at its next command."""
    try:
        # Something to read before anything was asked is the news of the end.
        ended = connection.is_connected and connection.can_read()
    except (redis.ConnectionError, redis.TimeoutError):
        ended = True
    if ended:
        connection.disconnect()
