"""A kept HTTP connection for ordinary code, whose answers can be waited for, and have a deadline."""

from __future__ import annotations

import http.client
import io
import math
import select
import socket
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

from mlops_ray.serving.client.wire import Call, Reply

DEADLINE_HEADER = "X-Request-Timeout-Ms"
"""How many milliseconds the caller goes on waiting; the endpoint gives up when they are over."""

_PIECE_BYTES = 65_536


class Connection:
    """One connection to an endpoint, for one request at a time.

    Deadlines are on the clock of ``time.monotonic``; past one, a TimeoutError is raised.
    """

    def __init__(self, address: str, context: ssl.SSLContext | None) -> None:
        parts = urlsplit(address)
        host = parts.hostname or ""
        self._made: http.client.HTTPConnection = (
            http.client.HTTPConnection(host, parts.port)
            if context is None
            else http.client.HTTPSConnection(host, parts.port, context=context)
        )
        # http.client waits so long for each piece of an answer, not for all of it.
        self._made.response_class = self._response  # type: ignore[assignment]
        self._heard = b""
        self._deadline_s = 0.0

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has come since the last answer: no word, and no end."""
        return self._made.sock is not None and not _readable([self._made.sock], 0.0)

    def send(self, call: Call, headers: dict[str, str], deadline_s: float) -> None:
        """Send a request, over a new connection where there is none yet."""
        left_s = left(deadline_s)
        if self._made.sock is None:
            self._made.timeout = left_s
            self._made.connect()
        self._made.sock.settimeout(left_s)
        target = urlsplit(call.url)
        headers = {**headers, **call.headers, DEADLINE_HEADER: milliseconds(left_s)}
        self._heard = b""
        self._made.request(call.method, target.path, call.body, headers)

    def reply(self, deadline_s: float) -> Reply:
        """Wait for the answer to the request and return it."""
        self._deadline_s = deadline_s
        with self._made.getresponse() as response:
            return Reply(
                response.status,
                response.read(),
                response.getheader("Content-Type", ""),
                response.getheader("Retry-After"),
            )

    def listen(self) -> bool:
        """Say whether the answer has begun, or the connection ended; does not wait.

        TLS has words of its own, after which a socket is readable and there is no answer yet.
        """
        if self._heard:
            return True
        connected: socket.socket = self._made.sock
        connected.settimeout(0.0)
        try:
            self._heard = connected.recv(_PIECE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError:
            return True  # reading the answer will say what it is
        return True

    def close(self) -> None:
        """Hang up."""
        self._made.close()

    def fileno(self) -> int:
        """Return the socket's number."""
        number: int = self._made.sock.fileno()
        return number

    def _response(self, sock: socket.socket, method: str | None = None) -> Any:
        return http.client.HTTPResponse(_Source(self, sock), method=method)  # type: ignore[arg-type]


def wait(connections: list[Connection], timeout_s: float) -> list[Connection]:
    """Return those whose answer has begun, or that have ended; none where the time is up first."""
    until_s = time.monotonic() + timeout_s
    while True:
        begun = [connection for connection in connections if connection.listen()]
        left_s = until_s - time.monotonic()
        if begun or left_s <= 0:
            return begun
        _readable(connections, left_s)


def left(deadline_s: float) -> float:
    """Return how many seconds are left. TimeoutError where none are."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no time is left")
    return left_s


def milliseconds(left_s: float) -> str:
    """Return the value of the deadline's header."""
    return str(max(1, math.ceil(left_s * 1000)))


class _Source:
    """What a response reads from: the socket, as a file."""

    def __init__(self, connection: Connection, sock: socket.socket) -> None:
        self._connection = connection
        self._sock = sock

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(self._connection, self._sock))


class _Timed(io.RawIOBase):
    """The bytes of a socket, until the connection's deadline; those heard already come first."""

    def __init__(self, connection: Connection, sock: socket.socket) -> None:
        self._connection = connection
        self._sock = sock
        # A file of the socket keeps it open when http.client closes the connection early.
        self._file = sock.makefile("rb", buffering=0)
        self._heard, connection._heard = connection._heard, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._heard:
            piece, self._heard = self._heard[: len(buffer)], self._heard[len(buffer) :]
            buffer[: len(piece)] = piece
            return len(piece)
        self._sock.settimeout(left(self._connection._deadline_s))
        return self._file.readinto(buffer) or 0

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _readable(sources: list[Any], timeout_s: float) -> bool:
    poll = select.poll()
    for source in sources:
        poll.register(source.fileno(), select.POLLIN)
    return bool(poll.poll(math.ceil(timeout_s * 1000)))
