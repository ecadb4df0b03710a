"""How many requests a replica takes at once, and how long each may take."""

from __future__ import annotations

import asyncio
from types import TracebackType

from mlops_ray.config.serving import Serving
from mlops_ray.errors import RequestError

TIMEOUT_HEADER = b"x-request-timeout-ms"


class Limits:
    """Counts the requests in flight of all doors of a replica.

    It takes ``max_ongoing_requests`` and lets ``max_queued_requests`` more wait. Serve would do the
    same before the application sees them; here, the wait counts against a request's deadline, and
    health is answered meanwhile.
    """

    def __init__(self, serving: Serving) -> None:
        self._most = serving.max_ongoing_requests + serving.max_queued_requests
        self._timeout_s = serving.timeout.total_seconds()
        self._retry_after_s = serving.retry_after.total_seconds()
        self.in_flight = 0

    def turn(self, timeout_ms: int | None = None) -> Turn:
        """Return a context for one request, which gives its deadline on the event loop's clock.

        ``timeout_ms`` may shorten the configured time. Inside, when the time is up, the request's
        task is interrupted; one that is cancelled from outside ends as usual.

        Raises (on entering and leaving):
            RequestError: 503 too many requests are in flight, 504 its time is up.
        """
        timeout_s = self._timeout_s
        if timeout_ms is not None and timeout_ms < timeout_s * 1000:
            timeout_s = timeout_ms / 1000
        return Turn(self, timeout_s)

    def _enter(self) -> None:
        if self.in_flight >= self._most:
            raise RequestError(
                "too many requests are being answered; come again",
                status=503,
                retry_after_s=self._retry_after_s,
            )
        self.in_flight += 1


class Turn:
    """One request in flight; see ``Limits.turn``."""

    __slots__ = ("_cancelling", "_late", "_limits", "_task", "_timeout_s", "_timer")

    def __init__(self, limits: Limits, timeout_s: float) -> None:
        self._limits = limits
        self._timeout_s = timeout_s
        self._late = False

    async def __aenter__(self) -> float:
        self._limits._enter()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        self._timer = loop.call_at(deadline_s, self._expire)
        return deadline_s

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._limits.in_flight -= 1
        self._timer.cancel()
        # As asyncio.timeout does: only if nobody else wants the task to end.
        if (
            self._late
            and self._task.uncancel() <= self._cancelling
            and (kind is not None and issubclass(kind, asyncio.CancelledError))
        ):
            raise late(self._timeout_s) from error

    def _expire(self) -> None:
        self._late = True
        self._task.cancel()


def late(timeout_s: float) -> RequestError:
    """Make the error for a request whose time is up."""
    return RequestError(f"the answer took longer than {timeout_s * 1000:.0f} ms", status=504)


def timeout_of(header: bytes | None) -> int | None:
    """Return the milliseconds of a header. RequestError 400 where it is no whole number above 0."""
    if header is None:
        return None
    if not header.isdigit() or len(header) > 15 or int(header) == 0:
        raise RequestError(
            f"{TIMEOUT_HEADER.decode()} must be a whole number of milliseconds", status=400
        )
    return int(header)
