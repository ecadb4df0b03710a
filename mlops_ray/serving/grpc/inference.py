"""Answering the protocol's calls in a replica, with what answers HTTP: the same guard, limits and
scoring. What goes wrong becomes a gRPC status that says the same as HTTP's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mlops_ray.errors import RequestError
from mlops_ray.serving.endpoint.limits import TIMEOUT_HEADER, timeout_of
from mlops_ray.serving.endpoint.scoring import of_version
from mlops_ray.serving.formats.answers import Answer
from mlops_ray.serving.formats.inference_protocol import server_metadata
from mlops_ray.serving.grpc import content
from mlops_ray.serving.grpc.messages import message_class

if TYPE_CHECKING:
    from mlops_ray.serving.endpoint.endpoint import Endpoint
    from mlops_ray.serving.models.loading import ModelSet

Metadata = Mapping[str, str]
Method = Callable[[bytes, Metadata], Awaitable[Any]]

_CODES = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_LONGEST_DETAILS = 1000

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that is bytes already; Serve asks it for them as it would a message."""

    content: bytes = b""

    def SerializeToString(self) -> bytes:  # noqa: N802, the name is protobuf's
        """Return the bytes."""
        return self.content


class Inference:
    """Answers for one endpoint, in its event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._methods: dict[str, Method] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }

    async def answer(self, method: str, body: bytes, context: Any) -> Reply:
        """Return the reply to one call; where there is none, ``context`` says why.

        The status is set, not raised: what is raised, Serve writes to its log with a traceback. Only
        a call that is cancelled, as when the client's deadline passes, ends with its CancelledError.
        """
        try:
            return Reply(await self._methods[method](body, dict(context.invocation_metadata())))
        except RequestError as error:
            _refuse(context, error)
        except Exception:
            logger.exception("%s failed", method)
            _refuse(context, RequestError("internal error; the log has the details", status=500))
        return Reply()

    async def _server_live(self, body: bytes, metadata: Metadata) -> bytes:
        return _message("ServerLiveResponse", live=True)

    async def _server_ready(self, body: bytes, metadata: Metadata) -> bytes:
        return _message("ServerReadyResponse", ready=self._endpoint.ready)

    async def _server_metadata(self, body: bytes, metadata: Metadata) -> bytes:
        self._endpoint.guard.check(_authorization(metadata), "metadata")
        return _message("ServerMetadataResponse", **server_metadata(package_version("mlops-ray")))

    async def _model_ready(self, body: bytes, metadata: Metadata) -> bytes:
        endpoint = self._endpoint
        endpoint.guard.check(_authorization(metadata), "metadata")
        message = content.parse("ModelReadyRequest", body)
        ready = True
        # To say so, a model may have to be loaded: that takes a turn, as a prediction does.
        async with endpoint.limits.turn(_told_ms(metadata)):
            try:
                models = await self._models_of(message.name)
                if message.version:
                    of_version(models, _version(message.version))
            except RequestError:
                ready = False
        return _message("ModelReadyResponse", ready=ready)

    async def _model_metadata(self, body: bytes, metadata: Metadata) -> bytes:
        endpoint = self._endpoint
        endpoint.guard.check(_authorization(metadata), "metadata")
        message = content.parse("ModelMetadataRequest", body)
        async with endpoint.limits.turn(_told_ms(metadata)):
            models = await self._models_of(message.name)
        versions = sorted({model.spec.version for model in models.all})
        if message.version:
            versions = [of_version(models, _version(message.version)).spec.version]
        described = endpoint.protocol.metadata(versions) | {"name": message.name}
        return _message("ModelMetadataResponse", **described)

    async def _infer(self, body: bytes, metadata: Metadata) -> bytes:
        began_s = time.perf_counter()
        status, route, version = 499, "", 0  # as HTTP servers count a client that went away
        model = ""
        try:
            reply, answer = await self._inferred(body, metadata)
            status, route, version = 200, answer.route or "", answer.version or 0
            model = answer.model
        except RequestError as error:
            status = error.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - began_s
            self._endpoint.recorder.request("grpc_infer", status, route, version, seconds, model)
        return reply

    async def _inferred(self, body: bytes, metadata: Metadata) -> tuple[bytes, Answer]:
        endpoint, recorder = self._endpoint, self._endpoint.recorder
        principal = endpoint.guard.check(_authorization(metadata), "predict")
        log = principal.logged(metadata.get("x-mlops-ray-log", "").encode())
        limit = endpoint.serving.max_body_bytes
        if len(body) > limit:
            raise RequestError(
                f"the message has {len(body)} bytes; {limit} are allowed", status=413
            )
        began_s = time.perf_counter()
        message = content.parse("ModelInferRequest", body)
        async with endpoint.limits.turn(_timeout_ms(message, metadata)) as deadline_s:
            request = content.read(message, endpoint.protocol)
            recorder.stage("parse", time.perf_counter() - began_s)
            answer = await endpoint.scoring.score(
                request.request,
                deadline_s,
                log=log,
                models=await self._models_of(message.model_name),
                version=_version(message.model_version),
            )
        began_s = time.perf_counter()
        answer.model = message.model_name
        reply = content.write(endpoint.protocol.outputs(request, answer), answer, message)
        recorder.stage("reply", time.perf_counter() - began_s)
        return reply, answer

    async def _models_of(self, name: str) -> ModelSet:
        endpoint = self._endpoint
        return await endpoint.models.of(None if name == endpoint.project else name)


def _message(name: str, /, **fields: Any) -> bytes:
    reply: bytes = message_class(name)(**fields).SerializeToString()
    return reply


def _authorization(metadata: Metadata) -> bytes | None:
    value = metadata.get("authorization")
    return None if value is None else value.encode()


def _timeout_ms(message: Any, metadata: Metadata) -> int | None:
    """The shorter of what metadata and the message say."""
    told = (_told_ms(metadata), content.timeout_ms(message))
    return min((wanted for wanted in told if wanted is not None), default=None)


def _told_ms(metadata: Metadata) -> int | None:
    text = metadata.get(TIMEOUT_HEADER.decode())
    return timeout_of(None if text is None else text.encode())


def _version(text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise RequestError(f"no version {text[:80]!r} here; versions are numbers", status=404)
    return int(text)


def _refuse(context: Any, error: RequestError) -> None:
    """Give the client status and details; field, row and when to come again as metadata too."""
    import grpc

    usual = "INVALID_ARGUMENT" if error.status < 500 else "INTERNAL"
    row = "" if error.row is None else f" (row {error.row})"
    details = f"{error.what[:_LONGEST_DETAILS]}{row}"
    context.set_code(getattr(grpc.StatusCode, _CODES.get(error.status, usual)))
    # A message may quote what a client sent, and not every string can be UTF-8.
    context.set_details(details.encode(errors="replace").decode())
    metadata = []
    if error.field is not None:
        metadata.append(("field", quote(error.field.encode(errors="replace"))))
    if error.row is not None:
        metadata.append(("row", str(error.row)))
    if error.retry_after_s is not None:
        metadata.append(("grpc-retry-pushback-ms", str(math.ceil(error.retry_after_s * 1000))))
    if metadata:
        context.set_trailing_metadata(metadata)
