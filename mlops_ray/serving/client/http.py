"""Clients of an endpoint's HTTP routes: ``Client`` for threads, ``AsyncClient`` for event loops.

Connections are kept open. A call is repeated when a connection breaks, but only where that cannot
count anything twice: when nothing had been sent yet, and for calls that may be repeated (reading,
labels, and predictions with ids of their own).
"""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import orjson

from mlops_ray.errors import RequestError, ServingError
from mlops_ray.metadata.types import Endpoint

TIMEOUT_S = 30.0

_PAUSES_S = (0.05, 0.2, 0.8)
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY
_JSON = {"Content-Type": "application/json"}
_NO_LOG = {**_JSON, "X-Mlops-Ray-Log": "off"}

Rows = Sequence[Mapping[str, Any]]
Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer: for each row its id, its score in [0, 1], and the score against the threshold."""

    version: int
    ids: list[str]
    scores: list[float]
    labels: list[int]


class Client:
    """Calls an endpoint from ordinary code; safe to share between threads, which take turns."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float = TIMEOUT_S) -> None:
        self._routes = _Routes(endpoint)
        address = urlsplit(endpoint.url)
        self._connection = http.client.HTTPConnection(
            address.hostname or "127.0.0.1", address.port, timeout=timeout_s
        )
        self._turn = threading.Lock()

    def predict(
        self,
        rows: Rows | None = None,
        *,
        columns: Columns | None = None,
        ids: Sequence[str] | None = None,
        log: bool = True,
    ) -> Prediction:
        """Return the scores of ``rows`` (or of the same, column by column).

        Args:
            rows: One mapping of the service's inputs for each row.
            columns: Instead of rows: one sequence for each input.
            ids: One for each row, to which a label can refer later; made up when left out.
            log: Whether the prediction counts for monitoring.

        Raises:
            RequestError: The endpoint refuses the request; ``field`` and ``row`` say where.
            ServingError: The endpoint cannot be reached, or fails.
        """
        body = _predict_body(rows, columns, ids)
        answer = self._call(
            "POST", self._routes.predict, body, _JSON if log else _NO_LOG, bool(ids)
        )
        return _prediction(answer)

    def feedback(self, labels: Rows) -> int:
        """Tell outcomes: mappings with ``id``, ``label`` (0 or 1) and perhaps ``known_at``.

        A label may be told again, and late. Returns how many were accepted. Raises as ``predict``.
        """
        answer = self._call("POST", self._routes.feedback, _dumps({"labels": labels}), _JSON, True)
        return int(answer["accepted"])

    def metadata(self) -> dict[str, Any]:
        """Return what the endpoint serves: versions by alias, packages, inputs, mode."""
        answer: dict[str, Any] = self._call("GET", self._routes.metadata, None, {}, True)
        return answer

    def close(self) -> None:
        """Close the connection; the next call opens it again."""
        with self._turn:
            self._connection.close()

    def _call(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], repeat: bool
    ) -> Any:
        with self._turn:
            for pause_s in (*_PAUSES_S, None):
                sent = False
                try:
                    if self._connection.sock is None:
                        self._connection.connect()
                    sent = True
                    self._connection.request(method, path, body, headers)
                    response = self._connection.getresponse()
                    return _content(response.status, response.read(), path)
                except (OSError, http.client.HTTPException) as error:
                    self._connection.close()
                    if pause_s is None or (sent and not repeat):
                        raise _unreachable(self._routes.url + path, error) from error
                    time.sleep(pause_s)
        raise AssertionError("not reached")


class AsyncClient:
    """Calls an endpoint from an event loop, on up to ``connections`` connections at once.

    Use it with ``async with``, or call ``close``. Methods are those of ``Client``. Without
    ``repeat``, a prediction is never tried twice: what breaks is seen.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        connections: int = 64,
        timeout_s: float = TIMEOUT_S,
        repeat: bool = True,
    ) -> None:
        self._routes = _Routes(endpoint)
        self._connections = connections
        self._repeat = repeat
        self._timeout_s = timeout_s
        self._session: Any = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def predict(
        self,
        rows: Rows | None = None,
        *,
        columns: Columns | None = None,
        ids: Sequence[str] | None = None,
        log: bool = True,
    ) -> Prediction:
        """Return the scores; see ``Client.predict``."""
        body = _predict_body(rows, columns, ids)
        headers = _JSON if log else _NO_LOG
        pauses = _PAUSES_S if self._repeat else ()
        answer = await self._call("POST", self._routes.predict, body, headers, bool(ids), pauses)
        return _prediction(answer)

    async def feedback(self, labels: Rows) -> int:
        """Tell outcomes; see ``Client.feedback``."""
        body = _dumps({"labels": labels})
        return int((await self._call("POST", self._routes.feedback, body, _JSON, True))["accepted"])

    async def metadata(self) -> dict[str, Any]:
        """Return what the endpoint serves; see ``Client.metadata``."""
        answer: dict[str, Any] = await self._call("GET", self._routes.metadata, None, {}, True)
        return answer

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _call(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        repeat: bool,
        pauses_s: tuple[float, ...] = _PAUSES_S,
    ) -> Any:
        from aiohttp import ClientConnectorError, ClientError

        if self._session is None:
            self._session = _session(self._connections, self._timeout_s)
        for pause_s in (*pauses_s, None):
            try:
                async with self._session.request(
                    method, self._routes.url + path, data=body, headers=headers
                ) as response:
                    return _content(response.status, await response.read(), path)
            except (ClientError, TimeoutError) as error:
                sent = not isinstance(error, ClientConnectorError)
                if pause_s is None or (sent and not repeat):
                    raise _unreachable(self._routes.url + path, error) from error
                await asyncio.sleep(pause_s)
        raise AssertionError("not reached")


class _Routes:
    """The addresses of an endpoint's routes."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.url = endpoint.url.rstrip("/")
        base = f"/v1/models/{endpoint.name}"
        self.predict = f"{base}/predict"
        self.feedback = f"{base}/feedback"
        self.metadata = f"{base}/metadata"


def _session(connections: int, timeout_s: float) -> Any:
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
    )


def _predict_body(rows: Rows | None, columns: Columns | None, ids: Sequence[str] | None) -> bytes:
    if (rows is None) == (columns is None):
        raise ServingError("give either rows or columns, not both or neither")
    body: dict[str, Any] = {"rows": rows} if rows is not None else {"columns": columns}
    if ids is not None:
        body["ids"] = ids
    return _dumps(body)


def _dumps(value: Any) -> bytes:
    """JSON; times without a zone are UTC on the other side. NaN becomes null, as JSON has none."""
    try:
        return orjson.dumps(value, default=_default, option=_OPTIONS)
    except TypeError as error:
        raise ServingError(
            "the request cannot be written as JSON",
            why=str(error),
            fix="use text, numbers, booleans, None and datetimes",
        ) from error


def _default(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON type")


def _prediction(answer: dict[str, Any]) -> Prediction:
    return Prediction(answer["version"], answer["ids"], answer["scores"], answer["labels"])


def _content(status: int, body: bytes, path: str) -> Any:
    """Return the JSON content of a 200; raise what any other status means."""
    if status == 200:
        return orjson.loads(body)
    try:
        error = orjson.loads(body)["error"]
        message, field, row = str(error["message"]), error["field"], error["row"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message, field, row = body[:200].decode(errors="replace").strip(), None, None
    if 400 <= status < 500:
        raise RequestError(message, status=status, field=field, row=row)
    raise ServingError(
        f"the endpoint answered {status}: {message}",
        where=path,
        fix="look into serve/ among the logs of Ray's session",
    )


def _unreachable(url: str, error: Exception) -> ServingError:
    return ServingError(
        "the endpoint does not answer",
        where=url,
        why=str(error) or type(error).__name__,
        fix="check that it is deployed: `mlops-ray run workflow=deploy`",
    )
