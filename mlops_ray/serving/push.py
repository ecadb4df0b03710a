"""The HTTP door of pushed sources: events in, an answer when they are durable."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
import pyarrow as pa
from pydantic import BaseModel

from mlops_ray.config.features import DType, Features
from mlops_ray.config.serving import Serving
from mlops_ray.errors import RequestError, ServingError
from mlops_ray.features.sources.events import check_events
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import Endpoint
from mlops_ray.serving.deployment import applications, runtime
from mlops_ray.serving.deployment.placement import roots_of, runtime_environment
from mlops_ray.serving.endpoint.asgi import (
    Message,
    Receive,
    Send,
    error_content,
    error_headers,
    json_reply,
    read_body,
    respond,
)
from mlops_ray.serving.formats.arrow_body import read_stream

ROUTE = "/v1/features"
IMPORT_PATH = "mlops_ray.serving.push:build"

_ARROW = b"application/vnd.apache.arrow.stream"

logger = logging.getLogger("ray.serve")


class PushDoor:
    """An ASGI application: ``POST /v1/features/<source>/events``.

    The body is ``{"rows": [{…}]}``, or an Arrow IPC stream with the content type
    ``application/vnd.apache.arrow.stream``. 202 with the count says that the events survive a crash.
    422 names field and row, and nothing of the request was taken. After 503 send all of it again.

    Args:
        columns: The columns of each pushed source.
        limit_bytes: The largest body.
        store: Stores checked events of a source; returns when they are durable.
    """

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, DType]],
        limit_bytes: int,
        store: Callable[[str, pa.Table], Awaitable[int]],
    ) -> None:
        self._columns = columns
        self._limit_bytes = limit_bytes
        self._store = store

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            await self._handle(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _handle(self, scope: Message, receive: Receive, send: Send) -> None:
        allow = ""
        try:
            source = self._source(scope["path"])
            if scope["method"] != "POST":
                allow = "POST"
                raise RequestError(f"{scope['method']} is not possible; use POST", status=405)
            headers = dict(scope["headers"])
            length = headers.get(b"content-length", b"")
            announced = int(length) if length.isdigit() else None
            body = await read_body(receive, announced, self._limit_bytes)
            events = _parse(body, headers.get(b"content-type", b""), self._columns[source])
            reply = json_reply({"accepted": await self._take(source, events)}, 202)
        except RequestError as error:
            reply = json_reply(error_content(error), error.status, error_headers(error, allow))
        await respond(send, reply)

    async def _take(self, source: str, events: pa.Table) -> int:
        try:
            return await self._store(source, events)
        except RequestError:
            raise
        except Exception as error:
            logger.exception("events of %s could not be stored", source)
            raise RequestError(
                "the events could not be stored; send them again", status=503
            ) from error

    def _source(self, path: str) -> str:
        parts = path.split("/")
        if len(parts) == 5 and "/".join(parts[:3]) == ROUTE and parts[4] == "events":
            if parts[3] in self._columns:
                return parts[3]
            known = ", ".join(self._columns)
            raise RequestError(f"no pushed source {parts[3][:80]!r}; known: {known}", status=404)
        raise RequestError(
            f"there is nothing at {path[:200]}; try {ROUTE}/<source>/events", status=404
        )


def _parse(body: bytes, kind: bytes, columns: Mapping[str, DType]) -> pa.Table:
    """Return the events of a body. RequestError 400 where it cannot be read, 422 where it is wrong."""
    if kind.partition(b";")[0].strip() == _ARROW:
        return check_events(columns, read_stream(body))
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}", status=400) from error
    if not isinstance(content, dict) or set(content) != {"rows"}:
        raise RequestError('the body must be an object like {"rows": [{…}]}', field="rows")
    rows = content["rows"]
    if not isinstance(rows, list) or not rows:
        raise RequestError("rows must be a list of at least one event", field="rows")
    return check_events(columns, rows)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def pushed_columns(features: Features) -> dict[str, dict[str, DType]]:
    """Return the columns of each pushed source."""
    return {n: dict(s.push) for n, s in features.sources.items() if s.push is not None}


class PushReplica:
    """What Serve calls in a replica; the work is done by ``PushDoor`` and the project's writer."""

    def __init__(self, settings: dict[str, Any]) -> None:
        wanted = PushSettings.model_validate(settings)
        self._project = wanted.project
        self._writer: Any = None
        self._door = PushDoor(wanted.columns, wanted.limit_bytes, self._store)

    def __serve_build_asgi_app__(self) -> PushDoor:
        return self._door

    async def _store(self, source: str, events: pa.Table) -> int:
        from ray.exceptions import RayError, RayTaskError

        from mlops_ray.features.push import find_writer

        self._writer = self._writer or find_writer(self._project)
        try:
            return int(await self._writer.push.remote(source, events))
        except RayTaskError as error:
            raise error.cause from None
        except RayError:
            self._writer = None
            raise


class PushSettings(BaseModel):
    """The arguments of the application, as JSON."""

    project: str
    columns: dict[str, dict[str, DType]]
    limit_bytes: int
    num_cpus: float
    max_ongoing_requests: int


def build(args: dict[str, Any]) -> Any:
    """Return the Serve application for ``args`` (see ``PushSettings``)."""
    from ray import serve

    wanted = PushSettings.model_validate(args)
    deployment: Any = serve.deployment(
        name="push",
        max_ongoing_requests=wanted.max_ongoing_requests,
        ray_actor_options={"num_cpus": wanted.num_cpus},
        max_surge_percent=100,
        logging_config={"enable_access_log": False},
    )(serve.ingress()(PushReplica))
    return deployment.bind(args)


def deploy(project: str, home: Home, serving: Serving, features: Features) -> Endpoint:
    """Open the HTTP door of a project's pushed sources; return when it takes events.

    Its writer is started, or replaced where it was made for other declarations. One project of a
    cluster can have the door.

    Raises:
        ServingError: No source is pushed, another project has the door, or it cannot be opened.
    """
    from mlops_ray.features.push import ensure_writer

    columns = pushed_columns(features)
    if not columns:
        raise ServingError(
            "no source takes pushed events",
            where="features.sources",
            fix="declare one with push: {column: type, …}",
        )
    ensure_writer(features, home, project)
    settings = PushSettings(
        project=project,
        columns=columns,
        limit_bytes=serving.max_body_bytes,
        num_cpus=serving.num_cpus,
        max_ongoing_requests=serving.max_ongoing_requests,
    )
    with applications.alone():
        runtime.start(serving, home)
        _put(application_name(project), settings)
    return Endpoint(name=application_name(project), url=runtime.url(serving), versions={})


def application_name(project: str) -> str:
    """Return the name of the Serve application."""
    return f"{project}-push"


def _put(name: str, settings: PushSettings) -> None:
    current = applications.details()
    for other, state in current["applications"].items():
        if other != name and state["route_prefix"] == ROUTE:
            raise ServingError(
                f"{other} takes the pushed events on this cluster",
                where=ROUTE,
                fix="take it down first, or use another cluster",
            )
    environment, _ = runtime_environment(roots_of([]))
    wanted = {
        "name": name,
        "route_prefix": ROUTE,
        "import_path": IMPORT_PATH,
        "runtime_env": environment,
        "args": settings.model_dump(mode="json"),
    }
    if applications.deployed(current, name) != wanted:
        applications.put(current, name, wanted)
    applications.wait_until_running(name, f"the door of {settings.project}'s pushed events")
