"""The endpoint: one Ray Serve replica that answers HTTP requests with the models it holds.

A plain ASGI application. On the path of a request there is one process and no actor call: parse,
look up features, score, append to the log, answer.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson

from mlops_ray.config.features import Features
from mlops_ray.config.serving import Serving
from mlops_ray.errors import RequestError, ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint.asgi import (
    Message,
    Receive,
    Send,
    error_content,
    read_body,
    respond,
)
from mlops_ray.serving.formats.request import RequestSchema, parse_feedback
from mlops_ray.serving.log.prediction_log import Answered, PredictionLog, Sink
from mlops_ray.serving.models.loading import Columns, ModelLoader, ModelSet
from mlops_ray.serving.models.served import ServedModels

Handler = Callable[[bytes, bool], Awaitable[Any]]

NO_LOG_HEADER = b"x-mlops-ray-log"
"""With the value ``off``, a prediction is answered but neither logged nor profiled."""

logger = logging.getLogger("ray.serve")


class Endpoint:
    """Answers for one project. ``lookup`` turns request columns into all feature columns.

    Routes: ``POST /v1/models/<project>/predict`` and ``…/feedback``, ``GET …/metadata``,
    ``/healthz`` (the process lives), ``/readyz`` (it has a model). Errors are
    ``{"error": {"message", "field", "row"}}``.
    """

    def __init__(
        self,
        project: str,
        home: Home,
        serving: Serving,
        features: Features,
        service: str,
        *,
        lookup: Callable[[Columns], Columns],
        loader: ModelLoader,
        replica: str,
        sink: Sink | None = None,
    ) -> None:
        self._project = project
        self._serving = serving
        self._service = features.services[service]
        self._schema = RequestSchema(self._service.inputs, serving.max_rows)
        self._lookup = lookup
        self._loader = loader
        self._replica = replica
        self._log = PredictionLog(home.predictions(project), replica, self._service.inputs, sink)
        self._models: ModelSet | None = None
        self._refused: dict[str, Any] | None = None
        self._loading = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None
        self._id_prefix = uuid.uuid4().hex
        self._id_count = 0
        self._routes: dict[str, dict[str, Handler]] = {
            "predict": {"POST": self._predict},
            "feedback": {"POST": self._feedback},
            "metadata": {"GET": self._metadata},
            "healthz": {"GET": self._alive},
            "readyz": {"GET": self._ready},
        }

    async def reconfigure(self, user_config: Any) -> None:
        """Serve the models that ``user_config`` names (see ``ServedModels``); safe to repeat.

        The new ones are loaded and verified beside those in service, which answer until then. Where
        one is broken, the old ones stay, and ``describe`` says why: were the error raised, Serve
        would stop this replica. It is raised only when there is nothing to serve yet.
        """
        served = ServedModels.parse(user_config)
        async with self._loading:
            if self._models is not None and self._models.served == served:
                self._refused = None
                return
            try:
                with _eager_switching():
                    models = await asyncio.to_thread(self._loader.load, served, self._models)
            except ServingError as error:
                if self._models is None:
                    raise
                self._refused = {"epoch": served.epoch, "why": str(error)}
                logger.error("epoch %d is refused: %s", served.epoch, error)
                return
            self._models, self._refused = models, None

    async def flush(self) -> int:
        """Write and send the prediction log; return how many rows and labels were pending.

        Returns after the monitor has taken them in. So a monitor that calls this must be able to
        take them meanwhile: it has to be an async actor.
        """
        return await self._log.flush(confirm=True)

    def describe(self) -> dict[str, Any]:
        """Return what is served, as a JSON value; ``refused`` says why a newer epoch is not."""
        models = self._models
        return {
            "model": self._project,
            "versions": {} if models is None else models.versions,
            "answer": None if models is None else models.answer.spec.alias,
            "epoch": None if models is None else models.served.epoch,
            "packages": {} if models is None else {m.spec.alias: m.spec.path for m in models.all},
            "refused": self._refused,
            "replica": self._replica,
            "mode": "throughput"
            if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
            else "default",
            "threshold": self._serving.threshold,
            "inputs": {n: f.model_dump(mode="json") for n, f in self._service.inputs.items()},
            "pending_rows": self._log.pending_rows,
            "dropped_rows": self._log.dropped_rows,
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._flushing = asyncio.create_task(self._flush_repeatedly())
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self._stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _stop(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
        try:
            await self._log.flush()
        except OSError:
            logger.exception("the last %d rows could not be written", self._log.pending_rows)

    async def _flush_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(self._serving.log.report_every.total_seconds())
            try:
                await self._log.flush()
            except Exception:
                logger.exception("the prediction log could not be written; it is kept")

    async def _handle(self, scope: Message, receive: Receive, send: Send) -> None:
        allow = ""
        try:
            handlers = self._route(scope["path"])
            handler = handlers.get(scope["method"])
            if handler is None:
                allow = ", ".join(handlers)
                raise RequestError(f"{scope['method']} is not possible; use {allow}", status=405)
            length, log = _headers(scope["headers"])
            body = b""
            if scope["method"] == "POST":
                body = await read_body(receive, length, self._serving.max_body_bytes)
            status, content = 200, await handler(body, log)
        except RequestError as error:
            status, content = error.status, error_content(error)
        except _NotReadyError:
            status, content = 503, error_content(RequestError("no model is loaded yet"))
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            status, content = (
                500,
                error_content(RequestError("internal error; the log has the details")),
            )
        await respond(send, status, orjson.dumps(content), allow)

    def _route(self, path: str) -> dict[str, Handler]:
        if path in ("/healthz", "/readyz"):
            return self._routes[path[1:]]
        parts = path.split("/")
        if len(parts) == 5 and parts[:3] == ["", "v1", "models"] and parts[4] in self._routes:
            if parts[3] == self._project:
                return self._routes[parts[4]]
            raise RequestError(f"no model {parts[3][:80]!r} here, only {self._project}", status=404)
        known = [f"/v1/models/{self._project}/{action}" for action in self._routes]
        close = difflib.get_close_matches(path[:200], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; try {known[0]}"
        raise RequestError(f"there is nothing at {path[:200]}{hint}", status=404)

    async def _predict(self, body: bytes, log: bool) -> Any:
        models = self._models
        if models is None:
            raise _NotReadyError
        request = self._schema.parse(body)
        columns = self._lookup(request.columns)
        scores = models.answer.scorer.predict(columns)
        if not np.isfinite(scores).all():
            raise ServingError(
                f"version {models.answer.spec.version} gave a score that is no number"
            )
        ids = request.ids if request.ids is not None else self._new_ids(request.rows)
        if log:
            times = request.columns[self._service.time]
            self._log.add(Answered(models, ids, times, scores, request.columns, columns))
        values: list[float] = scores.tolist()
        return {
            "model": self._project,
            "version": models.answer.spec.version,
            "ids": ids,
            "scores": values,
            "labels": [int(value >= self._serving.threshold) for value in values],
        }

    async def _feedback(self, body: bytes, log: bool) -> Any:
        feedback = parse_feedback(body, self._serving.max_rows, datetime.now(UTC))
        if log:
            self._log.add_labels(feedback)
        return {"accepted": len(feedback.ids)}

    async def _metadata(self, body: bytes, log: bool) -> Any:
        return self.describe()

    async def _alive(self, body: bytes, log: bool) -> Any:
        return {"status": "alive"}

    async def _ready(self, body: bytes, log: bool) -> Any:
        if self._models is None:
            raise _NotReadyError
        return {"status": "ready"}

    def _new_ids(self, rows: int) -> list[str]:
        first, self._id_count = self._id_count, self._id_count + rows
        return [f"{self._id_prefix}-{number}" for number in range(first, first + rows)]


@contextmanager
def _eager_switching() -> Iterator[None]:
    """Let a thread wait for the interpreter 0.5 ms at most, so that loading delays no answer."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(usual_s)


class _NotReadyError(Exception):
    """There is no model to answer with."""


def _headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[int | None, bool]:
    """Return the announced length of the body, and whether the request is to be logged."""
    length, log = None, True
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            length = int(value)
        elif name == NO_LOG_HEADER:
            log = value.lower() != b"off"
    return length, log
