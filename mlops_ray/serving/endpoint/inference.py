"""The routes of ``/v2``: the Open Inference Protocol, for clients of KServe and Triton."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version

from mlops_ray.errors import RequestError
from mlops_ray.serving.endpoint.asgi import Reply, json_reply
from mlops_ray.serving.endpoint.calls import Call
from mlops_ray.serving.endpoint.metrics import Recorder
from mlops_ray.serving.endpoint.native import NO_LOG_HEADER, STALE_HEADER, ModelsOf
from mlops_ray.serving.endpoint.scoring import Scoring, of_version
from mlops_ray.serving.formats.inference_protocol import (
    HEADER_LENGTH,
    InferenceProtocol,
    server_metadata,
)

_CONTENT_TYPE = b"content-type"


class InferenceApi:
    """Handles the calls of ``/v2``.

    Args:
        protocol: Reads and writes; other models have the same inputs.
        scoring: Answers them.
        recorder: Counts.
        models_of: Returns the models of a name, None for the endpoint's own.
        is_ready: Says whether there are models.
    """

    def __init__(
        self,
        protocol: InferenceProtocol,
        scoring: Scoring,
        recorder: Recorder,
        models_of: ModelsOf,
        is_ready: Callable[[], bool],
    ) -> None:
        self._protocol = protocol
        self._scoring = scoring
        self._recorder = recorder
        self._models_of = models_of
        self._is_ready = is_ready

    async def live(self, call: Call) -> Reply:
        """Say that the process lives."""
        return json_reply({"live": True})

    async def ready(self, call: Call) -> Reply:
        """Say whether the endpoint, or the version in the path, can answer."""
        if not self._is_ready():
            return json_reply({"ready": False}, 503)
        if call.version is not None or call.model is not None:
            of_version(await self._models_of(call.model), call.version)
        return json_reply({"ready": True})

    async def server(self, call: Call) -> Reply:
        """Describe the server."""
        return json_reply(server_metadata(version("mlops-ray")))

    async def model(self, call: Call) -> Reply:
        """Describe the model: versions, inputs, outputs."""
        models = await self._models_of(call.model)
        versions = sorted({model.spec.version for model in models.all})
        if call.version is not None:
            versions = [of_version(models, call.version).spec.version]
        described = self._protocol.metadata(versions)
        return json_reply(described if call.model is None else described | {"name": call.model})

    async def infer(self, call: Call) -> Reply:
        """Answer an inference."""
        began_s = time.perf_counter()
        asked = self._protocol.read(call.body, _header_length(call))
        self._recorder.stage("parse", time.perf_counter() - began_s)
        models = None if call.model is None else await self._models_of(call.model)
        log = call.principal.logged(call.headers.get(NO_LOG_HEADER, b""))
        answer = await self._scoring.score(
            asked.request, call.deadline_s, log=log, models=models, version=call.version
        )
        began_s = time.perf_counter()
        if call.model is not None:
            answer.model = call.model
        call.route, call.answered = answer.route or "", answer.version or 0
        body, headers = self._protocol.write(asked, answer)
        kind = next(value for name, value in headers if name == _CONTENT_TYPE)
        further = tuple(header for header in headers if header[0] != _CONTENT_TYPE)
        self._recorder.stage("reply", time.perf_counter() - began_s)
        return Reply(body, 200, kind, (*further, STALE_HEADER) if answer.stale else further)


def _header_length(call: Call) -> int | None:
    length = call.headers.get(HEADER_LENGTH)
    if length is None:
        return None
    if not length.isdigit() or len(length) > 15:
        raise RequestError(f"{HEADER_LENGTH.decode()} must be a number of bytes", status=400)
    return int(length)
