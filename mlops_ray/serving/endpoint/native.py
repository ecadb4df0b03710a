"""The routes of ``/v1``: predictions, feedback, explanations, metadata, and the health of a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import orjson

from mlops_ray.config.serving import Serving
from mlops_ray.errors import RequestError, ServingError
from mlops_ray.serving.endpoint.asgi import Reply, json_reply
from mlops_ray.serving.endpoint.calls import Call
from mlops_ray.serving.endpoint.metrics import Recorder
from mlops_ray.serving.endpoint.scoring import Scoring
from mlops_ray.serving.formats.answers import ARROW, JSON, arrow_answer, json_answer
from mlops_ray.serving.formats.arrow_body import read_stream
from mlops_ray.serving.formats.feedback import parse_feedback
from mlops_ray.serving.formats.request import PredictRequest, RequestSchema
from mlops_ray.serving.formats.safetensors_body import SAFETENSORS
from mlops_ray.serving.log.prediction_log import PredictionLog
from mlops_ray.serving.models.loading import ModelSet

NO_LOG_HEADER = b"x-mlops-ray-log"
"""With the value ``off``, a prediction is answered but neither logged nor profiled. Where tokens are
asked for, that needs the scope ``unlogged``."""

STALE_HEADER = (b"x-mlops-ray-features", b"stale")
"""Sent where features were older than the online store would have them."""

_UNSAID = (b"", b"application/x-www-form-urlencoded")
"""No type, and what curl and others name for a body of which nobody has said what it is."""

_MOST_EXPLAINED = 4

ModelsOf = Callable[[str | None], Awaitable[ModelSet]]


class NativeApi:
    """Handles the calls of ``/v1``.

    Args:
        serving: The endpoint's configuration.
        schema: Checks requests.
        scoring: Answers them.
        log: Keeps labels.
        recorder: Counts.
        models_of: Returns the models of a name, None for the endpoint's own.
    """

    def __init__(
        self,
        serving: Serving,
        schema: RequestSchema,
        scoring: Scoring,
        log: PredictionLog,
        recorder: Recorder,
        models_of: ModelsOf,
    ) -> None:
        self._serving = serving
        self._schema = schema
        self._scoring = scoring
        self._log = log
        self._recorder = recorder
        self._models_of = models_of
        # Explaining takes as long as hundreds of predictions: one at a time, beside the rest.
        self._explaining = ThreadPoolExecutor(1, thread_name_prefix="explain")
        # Those that wait for it keep their turns, which are the predictions' too.
        self._most_explained = max(1, min(_MOST_EXPLAINED, serving.max_ongoing_requests // 2))
        self._explained_now = 0

    async def predict(self, call: Call) -> Reply:
        """Answer a prediction."""
        began_s = time.perf_counter()
        request = self._parse(call)
        self._recorder.stage("parse", time.perf_counter() - began_s)
        models = None if call.model is None else await self._models_of(call.model)
        log = call.principal.logged(call.headers.get(NO_LOG_HEADER, b""))
        answer = await self._scoring.score(request, call.deadline_s, log=log, models=models)
        began_s = time.perf_counter()
        if call.model is not None:
            answer.model = call.model
        call.route, call.answered = answer.route or "", answer.version or 0
        headers = (STALE_HEADER,) if answer.stale else ()
        if ARROW in call.headers.get(b"accept", b""):
            reply = Reply(arrow_answer(answer), 200, ARROW, headers)
        else:
            reply = Reply(json_answer(answer), 200, JSON, headers)
        self._recorder.stage("reply", time.perf_counter() - began_s)
        return reply

    async def feedback(self, call: Call) -> Reply:
        """Keep labels."""
        if _media_type(call) != JSON:
            raise _unknown_media_type(call, JSON)
        feedback = parse_feedback(call.body, self._serving.max_rows, datetime.now(UTC))
        if call.principal.logged(call.headers.get(NO_LOG_HEADER, b"")):
            try:
                added = self._log.add_labels(feedback)
                if self._log.answers_wait:
                    await self._log.written(added)
            except ServingError as error:
                raise RequestError(
                    "the labels could not be kept; send them again",
                    status=503,
                    retry_after_s=self._serving.retry_after.total_seconds(),
                ) from error
        return json_reply({"accepted": len(feedback.ids)})

    async def explain(self, call: Call) -> Reply:
        """Say what each feature contributed to the scores."""
        if not self._serving.explain:
            raise RequestError("explanations are switched off here: serving.explain", status=404)
        if self._explained_now >= self._most_explained:
            raise RequestError(
                "others are being explained; come again",
                status=503,
                retry_after_s=self._serving.retry_after.total_seconds(),
            )
        self._explained_now += 1
        try:
            return await self._explain(call)
        finally:
            self._explained_now -= 1

    async def _explain(self, call: Call) -> Reply:
        request = self._parse(call)
        models = await self._models_of(call.model)
        model = models.answer
        if model.remote:
            raise RequestError("a model in other processes cannot be explained", status=404)
        found = await asyncio.get_running_loop().run_in_executor(
            self._explaining, lambda: model.explain(self._scoring.features(request.columns))
        )
        call.route, call.answered = model.spec.alias, model.spec.version
        content = {
            "model": call.model or self._scoring.project,
            "version": model.spec.version,
            "route": model.spec.alias,
            "ids": self._scoring.ids(request),
            "scores": found.scores,
            "base": found.base,
            "contributions": found.contributions,
        }
        return Reply(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))

    def _parse(self, call: Call) -> PredictRequest:
        kind = call.headers.get(b"content-type", b"")
        if kind == JSON or not kind:
            return self._schema.parse(call.body)
        kind = _media_type(call)
        if kind == JSON:
            return self._schema.parse(call.body)
        if kind == ARROW:
            return self._schema.parse_table(read_stream(call.body))
        if kind == SAFETENSORS:
            return self._schema.parse_tensors(call.body)
        raise _unknown_media_type(call, JSON, ARROW, SAFETENSORS)


def _media_type(call: Call) -> bytes:
    given = call.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    return JSON if given in _UNSAID else given


def _unknown_media_type(call: Call, *known: bytes) -> RequestError:
    given = _media_type(call)[:100].decode("latin-1")
    wanted = ", ".join(kind.decode() for kind in known)
    return RequestError(f"content type {given} is unknown; send {wanted}", status=415)
