"""Clients of an endpoint: ``Client`` for threads, ``AsyncClient`` for event loops.

Every prediction carries an id, made up here where none is given, and is known by it in the log. So a
prediction may be sent again, after a failure or beside a request that takes long: the same version
answers, and readers of the log find it once. Only the monitor's counts of feature values, which know
no ids, take in each answer that an endpoint gave.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mlops_ray.errors import ServingError
from mlops_ray.metadata.types import Endpoint
from mlops_ray.serving.client import wire
from mlops_ray.serving.client.blocking import BlockingExchange
from mlops_ray.serving.client.exchange import Exchange, tls_context
from mlops_ray.serving.client.hedging import Hedging
from mlops_ray.serving.client.results import Explanation, Prediction
from mlops_ray.serving.client.retries import Retries
from mlops_ray.serving.client.wire import Call, Columns, Routes, Rows

if TYPE_CHECKING:
    import pyarrow as pa

TIMEOUT_S = 30.0
CONNECTIONS = 64

_ID = "id"


class AsyncClient:
    """Calls an endpoint from an event loop. Use it with ``async with``, or call ``close``.

    Args:
        endpoint: What ``deploy`` returned, or a URL like ``http://host:8000/v1/models/NAME``.
        model: The model's name, where the URL does not say it.
        token: A bearer token, where the endpoint wants one.
        timeout_s: How long a call may take, all its tries together; the endpoint is told.
        connections: How many requests are under way at once; more wait for their turn.
        retries: When calls are tried again; None tries each just once: what breaks is seen.
        hedging: When predictions and explanations are sent a second time; None for never.
        verify: Whether the certificate of an ``https`` endpoint is checked.
        ca_file: A PEM file with the certificate that signed the endpoint's.
    """

    def __init__(
        self,
        endpoint: Endpoint | str,
        *,
        model: str | None = None,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
        connections: int = CONNECTIONS,
        retries: Retries | None = Retries(),  # noqa: B008, it is frozen
        hedging: Hedging | None = None,
        verify: bool = True,
        ca_file: Path | str | None = None,
    ) -> None:
        self._routes = Routes(endpoint, model)
        self._timeout_s = timeout_s
        context = tls_context(self._routes.secure, verify, ca_file)
        headers = _authorization(token)
        self._exchange = Exchange(headers, retries, hedging, connections, context)

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
        table: pa.Table | None = None,
        ids: Sequence[str] | None = None,
        log: bool = True,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Return the scores of rows, given in one of three forms.

        Args:
            rows: One mapping of the service's inputs for each row.
            columns: Instead of rows: one sequence for each input.
            table: Instead of both, for many rows: an Arrow table of the inputs.
            ids: One for each row, to which a label can refer later; made up when left out. A table
                may have them in a column ``id``.
            log: Whether the prediction counts for monitoring.
            timeout_s: For this call.

        Raises:
            RequestError: The endpoint refuses the request; ``status``, ``field`` and ``row`` say why.
            ServingError: The endpoint cannot be reached, fails, or does not answer in time.
        """
        call = _predict_call(self._routes, rows, columns, table, ids, log)
        return wire.prediction(await self._send(call, timeout_s), call.url)

    async def explain(
        self,
        rows: Rows | None = None,
        *,
        columns: Columns | None = None,
        timeout_s: float | None = None,
    ) -> Explanation:
        """Return what each feature contributes to the scores of rows; raises as ``predict``."""
        call = _rows_call(self._routes.explain, rows, columns, None, log=True)
        return wire.explanation(await self._send(call, timeout_s), call.url)

    async def feedback(self, labels: Rows, *, timeout_s: float | None = None) -> int:
        """Tell outcomes: mappings with ``id``, ``label`` (0 or 1) and perhaps ``known_at``.

        A label may be told again, and late. Returns how many were accepted. Raises as ``predict``.
        """
        call = wire.labels_call(self._routes.feedback, labels)
        return wire.accepted(await self._send(call, timeout_s), call.url)

    async def metadata(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Return what the endpoint serves: versions by alias, shares, inputs, mode."""
        call = Call("GET", self._routes.metadata, {})
        answer: dict[str, Any] = wire.content(await self._send(call, timeout_s), call.url)
        return answer

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the endpoint answers, and has a model to answer with; raises nothing."""
        call = Call("GET", self._routes.ready, {})
        try:
            return (await self._send(call, timeout_s)).status == 200
        except ServingError:
            return False

    async def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        await self._exchange.close()

    async def _send(self, call: Call, timeout_s: float | None) -> wire.Reply:
        return await self._exchange.send(call, self._timeout_s if timeout_s is None else timeout_s)


class Client:
    """Calls an endpoint from ordinary code. Safe to share between threads, which do not wait for
    each other, and with forks. Takes the arguments of ``AsyncClient``.
    """

    def __init__(
        self,
        endpoint: Endpoint | str,
        *,
        model: str | None = None,
        token: str | None = None,
        timeout_s: float = TIMEOUT_S,
        connections: int = CONNECTIONS,
        retries: Retries | None = Retries(),  # noqa: B008, it is frozen
        hedging: Hedging | None = None,
        verify: bool = True,
        ca_file: Path | str | None = None,
    ) -> None:
        self._routes = Routes(endpoint, model)
        self._timeout_s = timeout_s
        self._exchange = BlockingExchange(
            self._routes.address,
            _authorization(token),
            retries,
            hedging,
            connections,
            tls_context(self._routes.secure, verify, ca_file),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def predict(
        self,
        rows: Rows | None = None,
        *,
        columns: Columns | None = None,
        table: pa.Table | None = None,
        ids: Sequence[str] | None = None,
        log: bool = True,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Return the scores of rows; see ``AsyncClient.predict``."""
        call = _predict_call(self._routes, rows, columns, table, ids, log)
        return wire.prediction(self._send(call, timeout_s), call.url)

    def explain(
        self,
        rows: Rows | None = None,
        *,
        columns: Columns | None = None,
        timeout_s: float | None = None,
    ) -> Explanation:
        """Return what each feature contributes; see ``AsyncClient.explain``."""
        call = _rows_call(self._routes.explain, rows, columns, None, log=True)
        return wire.explanation(self._send(call, timeout_s), call.url)

    def feedback(self, labels: Rows, *, timeout_s: float | None = None) -> int:
        """Tell outcomes; see ``AsyncClient.feedback``."""
        call = wire.labels_call(self._routes.feedback, labels)
        return wire.accepted(self._send(call, timeout_s), call.url)

    def metadata(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Return what the endpoint serves; see ``AsyncClient.metadata``."""
        call = Call("GET", self._routes.metadata, {})
        answer: dict[str, Any] = wire.content(self._send(call, timeout_s), call.url)
        return answer

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Return whether the endpoint can answer; see ``AsyncClient.ready``."""
        call = Call("GET", self._routes.ready, {})
        try:
            return self._send(call, timeout_s).status == 200
        except ServingError:
            return False

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self._exchange.close()

    def _send(self, call: Call, timeout_s: float | None) -> wire.Reply:
        return self._exchange.send(call, self._timeout_s if timeout_s is None else timeout_s)


def _authorization(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _predict_call(
    routes: Routes,
    rows: Rows | None,
    columns: Columns | None,
    table: pa.Table | None,
    ids: Sequence[str] | None,
    log: bool,
) -> Call:
    if table is not None and rows is None and columns is None:
        return wire.table_call(routes.predict, _identified(table, ids), log=log)
    if table is not None:
        raise _not_one()
    return _rows_call(routes.predict, rows, columns, ids, log=log)


def _rows_call(
    url: str,
    rows: Rows | None,
    columns: Columns | None,
    ids: Sequence[str] | None,
    *,
    log: bool,
) -> Call:
    if (rows is None) == (columns is None):
        raise _not_one()
    if ids is None:
        ids = _new_ids(len(rows) if rows is not None else _length(columns or {}))
    return wire.rows_call(url, rows, columns, ids, log=log)


def _not_one() -> ServingError:
    return ServingError("give rows, columns or a table: one of them")


def _length(columns: Columns) -> int:
    return max((len(values) for values in columns.values()), default=0)


def _identified(table: pa.Table, ids: Sequence[str] | None) -> pa.Table:
    import pyarrow as pa

    if _ID not in table.column_names:
        given = _new_ids(table.num_rows) if ids is None else ids
        return table.append_column(_ID, pa.array(given, pa.string()))
    if ids is not None:
        raise ServingError(f"the table has a column {_ID!r} and ids are given too")
    return table


def _new_ids(rows: int) -> list[str]:
    # Made anew for each call: a counter would be the same on both sides of a fork.
    prefix = uuid.uuid4().hex
    return [f"{prefix}-{row}" for row in range(rows)]
