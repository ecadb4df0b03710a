"""The endpoint: one Ray Serve replica that answers HTTP requests with the models it holds.

A plain ASGI application. On the path of a request there is one process and no actor call: parse,
look up features, score, append to the log, answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from importlib.metadata import version
from typing import Any

from mlops_ray.config.features import Features
from mlops_ray.config.serving import Serving
from mlops_ray.errors import RequestError, ServingError
from mlops_ray.metadata.home import Home
from mlops_ray.serving.endpoint.asgi import (
    Message,
    Receive,
    Reply,
    Send,
    error_content,
    error_headers,
    json_reply,
    length_of,
    protocol_error_content,
    read_body,
    respond,
)
from mlops_ray.serving.endpoint.calls import Action, Call, Methods
from mlops_ray.serving.endpoint.guard import Guard
from mlops_ray.serving.endpoint.inference import InferenceApi
from mlops_ray.serving.endpoint.limits import TIMEOUT_HEADER, Limits, timeout_of
from mlops_ray.serving.endpoint.metrics import PUBLISH_EVERY_S, Recorder, Series
from mlops_ray.serving.endpoint.native import NativeApi
from mlops_ray.serving.endpoint.paths import Paths
from mlops_ray.serving.endpoint.routing import Router
from mlops_ray.serving.endpoint.scoring import Lookup, Scoring
from mlops_ray.serving.endpoint.swapping import ModelsByName, ModelsInService
from mlops_ray.serving.endpoint.tokens import Scope
from mlops_ray.serving.formats import openapi
from mlops_ray.serving.formats.inference_protocol import InferenceProtocol
from mlops_ray.serving.formats.request import RequestSchema
from mlops_ray.serving.log.prediction_log import PredictionLog
from mlops_ray.serving.models.changes import Change, Changes
from mlops_ray.serving.models.loading import ModelLoader, ModelSet
from mlops_ray.serving.models.served import ServedModels

_STUCK_AFTER = 3
"""So many times the longest answer is how long a batch may take before the replica counts as stuck."""

_FOLLOW_EVERY_S = 1.0

_INTERNAL = "internal error; the log has the details"

logger = logging.getLogger("ray.serve")


class Endpoint:
    """Answers for one project. ``lookup`` turns request columns into all feature columns.

    Routes: ``POST /v1/models/<project>/predict``, ``…/feedback`` and ``…/explain``, ``GET
    …/metadata``; the Open Inference Protocol under ``/v2``; ``/healthz`` (the process lives),
    ``/readyz`` (it has a model), ``/openapi.json``. Errors are ``{"error": {"message", "field",
    "row"}}``, under ``/v2`` ``{"error": "…"}``.

    Args:
        project: The endpoint's name.
        home: Where the prediction log lies.
        serving: The configuration.
        features: The declarations.
        service: The feature service whose inputs requests bring.
        lookup: Makes features of inputs.
        loader: Loads models.
        replica: The name of this replica, unlike any other's.
        many: Returns the models of other registered names, where the endpoint has them.
        series: Where metrics go; None keeps them here.

    Raises:
        ServingError: The file of tokens is not there.
    """

    def __init__(
        self,
        project: str,
        home: Home,
        serving: Serving,
        features: Features,
        service: str,
        *,
        lookup: Lookup,
        loader: ModelLoader,
        replica: str,
        many: ModelsByName | None = None,
        series: Series | None = None,
    ) -> None:
        self.project = project
        self.serving = serving
        self._service = features.services[service]
        self._replica = replica
        self._lookup = lookup
        self.guard = Guard(serving.security.tokens)
        self.limits = Limits(serving)
        self.recorder = Recorder(project, series)
        self.log = PredictionLog(
            home.predictions(project), replica, self._service.inputs, serving.log
        )
        schema = RequestSchema(self._service.inputs, serving.max_rows)
        self.protocol = InferenceProtocol(schema, project)
        self.scoring = Scoring(
            project,
            serving,
            self._service,
            lookup=lookup,
            own_models=self._own_models,
            log=self.log,
            recorder=self.recorder,
            router=Router(project, serving.routing.sticky_by),
            schema=schema,
        )
        self.models: ModelsInService = ModelsInService(
            loader, self.scoring.warm, self.scoring.batcher.expect, many
        )
        native = NativeApi(serving, schema, self.scoring, self.log, self.recorder, self.models.of)
        inference = InferenceApi(
            self.protocol,
            self.scoring,
            self.recorder,
            self.models.of,
            lambda: self.ready,
        )
        self._is_many = many is not None
        self._paths = Paths(project, self._table(native, inference), many=self._is_many)
        self._document: Reply | None = None
        self._declared: ServedModels | None = None
        self._changes = Changes(home, project)
        self._running: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether there is a model to answer with."""
        return self.models.now is not None

    @property
    def versions(self) -> dict[str, int]:
        """The versions that are served, by alias, the answering one first."""
        return {} if self.models.now is None else self.models.now.versions

    def _own_models(self) -> ModelSet:
        return self.models.own()

    async def reconfigure(self, user_config: Any) -> None:
        """Serve the models that ``user_config`` declares (see ``ServedModels``), or those that have
        taken their place since; see ``ModelsInService.take``.

        Raises:
            ServingError: It declares none, or it cannot be read which have taken their place.
        """
        self._declared = declared = ServedModels.parse(user_config)
        try:
            change = self._changes.read(declared) or Change(served=declared)
            await self.models.take(change, again=True)
            await self.adopt()
        except ServingError:
            if self.models.now is None:
                raise
            logger.exception("changed models are looked for again")

    async def adopt(self) -> None:
        """Serve the models that the endpoint was changed to, if it was.

        Raises:
            ServingError: That cannot be read; what is served stays.
        """
        tried = None
        # While some are loaded, others may take their place, and nobody tells a replica twice.
        while self._declared and (change := self._changes.read(self._declared)) != tried:
            tried = change
            if change is not None:
                await self.models.take(change)

    async def flush(self) -> int:
        """Write the prediction log; return how many rows and labels were pending."""
        return await self.log.flush()

    def describe(self) -> dict[str, Any]:
        """Return what is served, as a JSON value; ``refused`` says why a newer epoch is not."""
        models = self.models.now
        return {
            "model": self.project,
            "versions": self.versions,
            "answer": None if models is None else models.answer.spec.alias,
            "shares": {} if models is None else _shares(models),
            "epoch": None if models is None else models.served.epoch,
            "packages": {} if models is None else {m.spec.alias: m.spec.path for m in models.all},
            "forms": {} if models is None else models.forms,
            "refused": self.models.refused,
            "replica": self._replica,
            "mode": "throughput"
            if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
            else "default",
            "threshold": self.serving.threshold,
            "inputs": {n: f.model_dump(mode="json") for n, f in self._service.inputs.items()},
            **self.log.describe(),
        }

    def scaling_stats(self) -> dict[str, float]:
        """Return what autoscaling may go by: ``latency_p95_ms`` since the last call, 0 without any."""
        return {"latency_p95_ms": self.recorder.latency_p95_s() * 1000}

    def check(self) -> None:
        """Say whether this replica should be replaced.

        Raises:
            ServingError: A batch has been worked on for so long that its end is not to be expected.
        """
        stuck_s = _STUCK_AFTER * self.serving.timeout.total_seconds()
        if self.scoring.batcher.busy_s > stuck_s:
            raise ServingError(
                "a model does not come back",
                where=self._replica,
                why=f"a batch has taken {self.scoring.batcher.busy_s:.0f} s",
            )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def start(self) -> None:
        """Begin to write the log and to publish metrics."""
        self.log.start()
        self._running = [asyncio.create_task(work) for work in (self._tick(), self._follow())]

    async def stop(self) -> None:
        """Write the rest of the log. Safe to repeat."""
        if self._running:
            for task in self._running:
                task.cancel()
            self._running = []
            await self.log.close()

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(PUBLISH_EVERY_S)
            try:
                self.guard.refresh()
                self.recorder.publish(self._gauges(), self._lookup.reads)
            except Exception:
                logger.exception("metrics or tokens could not be brought up to date")

    async def _follow(self) -> None:
        """Adopt changes of which nobody has told this replica, since it was just starting."""
        seen = None
        while True:
            try:
                if (declared := self._declared) is not None:
                    now = declared.epoch, self._changes.stamp(declared)
                    if now != seen:
                        await self.adopt()
                        seen = now
            except Exception:
                logger.exception("changed models could not be taken")
            await asyncio.sleep(_FOLLOW_EVERY_S)

    def _gauges(self) -> dict[str, float]:
        return {
            "mlops_ray_in_flight": self.limits.in_flight,
            "mlops_ray_queued": self.scoring.batcher.queued,
            "mlops_ray_log_pending_rows": self.log.pending_rows,
        }

    async def _handle(self, scope: Message, receive: Receive, send: Send) -> None:
        began_s = time.perf_counter()
        method, path, name, allow = scope["method"], scope["path"], "unknown", ""
        call: Call | None = None
        try:
            found = self._paths.find(path)
            action = found.methods.get("GET" if method == "HEAD" else method)
            if action is None:
                allow = ", ".join(found.methods).replace("GET", "GET, HEAD")
                raise RequestError(f"{method} is not possible; use {allow}", status=405)
            name = action.name
            call = Call(dict(scope["headers"]), b"", 0.0, found.model, found.version)
            reply = await self._act(action, call, method, receive)
        except RequestError as error:
            reply = _refusal(error, path, allow)
        except Exception:
            logger.exception("%s %s failed", method, path)
            reply = _refusal(RequestError(_INTERNAL, status=500), path)
        await respond(send, reply, head=method == "HEAD")
        route, version, model = "", 0, None
        if call is not None:
            route, version = call.route, call.answered
            # A name that nobody has must not become a tag.
            model = call.model if call.model is None or version else ""
        seconds = time.perf_counter() - began_s
        self.recorder.request(name, reply.status, route, version, seconds, model)

    async def _act(self, action: Action, call: Call, method: str, receive: Receive) -> Reply:
        """Let a request in, and do what it wants."""
        if action.scope is None:
            return await action.handler(call)
        headers = call.headers
        call.principal = self.guard.check(headers.get(b"authorization"), action.scope)
        async with self.limits.turn(timeout_of(headers.get(TIMEOUT_HEADER))) as deadline_s:
            call.deadline_s = deadline_s
            if method == "POST":
                announced = length_of(headers.get(b"content-length", b""))
                call.body = await read_body(receive, announced, self.serving.max_body_bytes)
            return await action.handler(call)

    def _table(self, native: NativeApi, inference: InferenceApi) -> dict[str, Methods]:
        health = {"GET": Action("health", self._alive)}
        ready = {"GET": Action("ready", self._ready)}
        metadata: Scope = "metadata"
        return {
            "/v1/models/{}/predict": {"POST": Action("predict", native.predict, "predict")},
            "/v1/models/{}/feedback": {"POST": Action("feedback", native.feedback, "feedback")},
            "/v1/models/{}/explain": {"POST": Action("explain", native.explain, "explain")},
            "/v1/models/{}/metadata": {"GET": Action("metadata", self._metadata, metadata)},
            "/v2/models/{}/infer": {"POST": Action("infer", inference.infer, "predict")},
            "/v2/models/{}": {"GET": Action("model", inference.model, metadata)},
            "/v2/models/{}/ready": {"GET": Action("ready", inference.ready, metadata)},
            "/v2": {"GET": Action("server", inference.server, metadata)},
            "/v2/health/live": {"GET": Action("health", inference.live)},
            "/v2/health/ready": {"GET": Action("ready", inference.ready)},
            "/healthz": health,
            "/readyz": ready,
            "/openapi.json": {"GET": Action("openapi", self._openapi)},
        }

    async def _metadata(self, call: Call) -> Reply:
        return json_reply(_public(self.describe()))

    async def _alive(self, call: Call) -> Reply:
        return json_reply({"status": "alive"})

    async def _ready(self, call: Call) -> Reply:
        self.models.own()
        return json_reply({"status": "ready"})

    async def _openapi(self, call: Call) -> Reply:
        if self._document is None:
            name = openapi.NAME if self._is_many else self.project
            content = openapi.document(
                name, self._service.inputs, self.serving, version("mlops-ray")
            )
            self._document = json_reply(content)
        return self._document


def _refusal(error: RequestError, path: str, allow: str = "") -> Reply:
    content = protocol_error_content if path.startswith("/v2") else error_content
    return json_reply(content(error), error.status, error_headers(error, allow))


def _public(described: dict[str, Any]) -> dict[str, Any]:
    """Return what may be told to callers: no path and no trace of this machine."""
    refused = described["refused"]
    return {name: value for name, value in described.items() if name != "packages"} | {
        "refused": None if refused is None else {"epoch": refused["epoch"]},
        "failing": described["failing"] is not None,
    }


def _shares(models: ModelSet) -> dict[str, float]:
    """Return the share of each alias that answers."""
    shares = {c.spec.alias: c.share for c in models.served.challengers}
    return {models.answer.spec.alias: max(0.0, 1.0 - sum(shares.values())), **shares}
