"""The OpenAPI document of an endpoint: every route, with the model's own inputs."""

from __future__ import annotations

from typing import Any

from mlops_ray.config.serving import Serving
from mlops_ray.serving.formats.answers import ARROW, JSON
from mlops_ray.serving.formats.inference_protocol import HEADER_LENGTH
from mlops_ray.serving.formats.openapi_schemas import (
    Inputs,
    Json,
    example_infer,
    example_row,
    ref,
    schemas,
)
from mlops_ray.serving.formats.safetensors_body import SAFETENSORS

OPENAPI = "3.1.0"
NAME = "{name}"
"""Stands for the model in the paths of an endpoint for many models."""

_JSON, _ARROW, _TENSORS = JSON.decode(), ARROW.decode(), SAFETENSORS.decode()
_BINARY = "application/octet-stream"
_MISTAKES = {
    "400": "The body cannot be read.",
    "404": "There is no such model or route here.",
    "405": "The method is not possible; `Allow` says which are.",
    "413": "The body has too many bytes or rows.",
    "415": "The body has a content type that is not known here.",
    "422": "A value is not as declared; field and row are named.",
    "500": "The endpoint's own fault; its log has the details.",
    "503": "There is no model yet, no room, or a store that cannot be reached. Come again later.",
    "504": "The time for the answer is over.",
}
_GUARDED = {
    "401": "There is no token, or one that is not known.",
    "403": "The token is not for this.",
    "429": "The token has had its requests for now. Come again later.",
}
_HEADERS = {
    "401": {"WWW-Authenticate": {"schema": {"type": "string"}}},
    "405": {"Allow": {"schema": {"type": "string"}}},
    "429": {"Retry-After": {"schema": {"type": "integer", "minimum": 0}}},
    "503": {"Retry-After": {"schema": {"type": "integer", "minimum": 0}}},
}
_NOT_READY = {
    "503": {
        "description": "Not yet.",
        "content": {_JSON: {"schema": {"anyOf": [ref("Health"), ref("ProtocolError")]}}},
    }
}
_WHERE = (
    "The routes lie at the root for a cluster's first endpoint, and for every endpoint also behind"
    " `/v1/models/` and its name."
)
_PARTS = {
    "name": {"type": "string"},
    "version": {"type": "integer", "minimum": 0, "maximum": 10**15 - 1},
}
_UNLOGGED = {
    "name": "X-Mlops-Ray-Log",
    "in": "header",
    "description": "Keeps the request out of the log; of a token, the scope `unlogged` allows it.",
    "schema": {"enum": ["off"]},
}
_STALE = {
    "description": "Sent where the online store could not be reached and features may be old.",
    "schema": {"enum": ["stale"]},
}
_BINARY_FROM = {"description": "Sent with binary tensors: how many bytes before them are JSON."}
_TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "How long the answer may take, where it is less than the endpoint's own limit.",
    "schema": {"type": "integer", "minimum": 1},
}


def document(model: str, inputs: Inputs, serving: Serving, version: str) -> Json:
    """Return the document of an endpoint, a JSON value.

    Args:
        model: What the model is called in paths; ``NAME`` where there are many.
        inputs: The inputs of the model's feature service.
        serving: Its limits, and what is turned on.
        version: The version of the endpoint's software.
    """
    errors = _errors("Error")
    protocol_errors = {f"Protocol{name}": error for name, error in _errors("ProtocolError").items()}
    content: Json = {
        "openapi": OPENAPI,
        "info": {"title": _title(model), "version": version, "description": _WHERE},
        "paths": _Paths(model, inputs, serving).all(),
        "components": {
            "schemas": schemas(inputs, serving.max_rows),
            "responses": {**errors, **protocol_errors},
        },
    }
    if serving.security.tokens is not None:
        content["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return content


class _Paths:
    """The routes of one endpoint."""

    def __init__(self, model: str, inputs: Inputs, serving: Serving) -> None:
        self._model = model
        self._inputs = inputs
        self._explain = serving.explain
        self._guarded = serving.security.tokens is not None

    def all(self) -> Json:
        return {**self._health(), **self._own(), **self._protocol()}

    def _health(self) -> Json:
        document = {"200": {"description": "This.", "content": {_JSON: {"schema": {}}}}}
        return {
            "/healthz": {"get": self._open("alive", "The process lives.", "Status")},
            "/readyz": {"get": self._open("ready", "It has a model.", "Status")},
            "/openapi.json": {
                "get": {
                    "operationId": "document",
                    "summary": "This document.",
                    "responses": document,
                }
            },
        }

    def _own(self) -> Json:
        base = f"/v1/models/{self._model}"
        paths = {
            f"{base}/predict": {
                "post": self._predict("predict", "Scores of rows.", "PredictAnswer")
            },
            f"{base}/feedback": {"post": self._feedback()},
            f"{base}/metadata": {
                "get": self._guard("metadata", "metadata", "What is served.", _answers("Metadata"))
            },
        }
        if self._explain:
            summary = "What each feature contributes to the scores."
            paths[f"{base}/explain"] = {"post": self._predict("explain", summary, "ExplainAnswer")}
        return self._named(paths)

    def _protocol(self) -> Json:
        base = f"/v2/models/{self._model}"
        paths: Json = {}
        for place, suffix in (("", ""), ("/versions/{version}", "OfVersion")):
            paths |= {
                f"{base}{place}": {"get": self._v2(f"model{suffix}", "A model.", "Model")},
                f"{base}{place}/ready": {"get": self._model_ready(f"modelReady{suffix}")},
                f"{base}{place}/infer": {"post": self._infer(f"infer{suffix}")},
            }
        health = {
            "/v2": {"get": self._v2("server", "The server.", "Server")},
            "/v2/health/live": {"get": self._v2_health("serverLive", "The process lives.")},
            "/v2/health/ready": {"get": self._v2_health("serverReady", "It has a model.")},
        }
        return {**health, **self._named(paths)}

    def _predict(self, name: str, summary: str, answer: str) -> Json:
        row = example_row(self._inputs)
        examples = {
            "rows": {"value": {"rows": [row], "ids": ["prediction-1"]}},
            "columns": {"value": {"columns": {field: [value] for field, value in row.items()}}},
        }
        body = {
            _JSON: {"schema": ref("PredictRequest"), "examples": examples},
            _ARROW: {"schema": {"description": "a column for each input, and `id`"}},
            _TENSORS: {"schema": {"description": "a tensor for each input, and `id`"}},
        }
        answers = _answers(answer)
        if name == "predict":
            answers["200"]["content"][_ARROW] = {"schema": {"description": "a row for each row"}}
            answers["200"]["headers"] = {"X-Mlops-Ray-Features": _STALE}
        operation = self._guard(name, name, summary, answers, body)
        operation["parameters"] = [_TIMEOUT, _UNLOGGED] if name == "predict" else [_TIMEOUT]
        return operation

    def _feedback(self) -> Json:
        label = {"id": "prediction-1", "label": 1, "known_at": "2024-03-02T12:00:00Z"}
        body = {_JSON: {"schema": ref("FeedbackRequest"), "example": {"labels": [label]}}}
        summary = "Labels of predictions, by their ids; may be repeated."
        answers = _answers("FeedbackAnswer")
        operation = self._guard("feedback", "feedback", summary, answers, body)
        operation["parameters"] = [_UNLOGGED]
        return operation

    def _infer(self, name: str) -> Json:
        binary = {"schema": {"description": "JSON, and binary tensors behind it"}}
        example = example_infer(self._inputs)
        body = {_JSON: {"schema": ref("InferRequest"), "example": example}, _BINARY: binary}
        answers = _answers("InferAnswer")
        answers["200"]["content"][_BINARY] = binary
        answers["200"]["headers"] = {
            "X-Mlops-Ray-Features": _STALE,
            HEADER_LENGTH.decode(): {**_BINARY_FROM, "schema": _natural()},
        }
        operation = self._guard(name, "predict", "Scores of tensors.", answers, body, "Protocol")
        length = {"name": HEADER_LENGTH.decode(), "in": "header", "schema": _natural()}
        length["description"] = "How many bytes of the body are JSON, where tensors are binary."
        operation["parameters"] = [length, _TIMEOUT, _UNLOGGED]
        return operation

    def _v2(self, name: str, summary: str, answer: str) -> Json:
        return self._guard(name, "metadata", summary, _answers(answer), errors="Protocol")

    def _v2_health(self, name: str, summary: str) -> Json:
        answers = {**_answers("Health"), **_refusals(_MISTAKES, "Protocol"), **_NOT_READY}
        return {"operationId": name, "summary": summary, "responses": answers}

    def _model_ready(self, name: str) -> Json:
        operation = self._v2(name, "The model can answer.", "Health")
        operation["responses"] |= _NOT_READY
        return operation

    def _open(self, name: str, summary: str, answer: str) -> Json:
        answers = {**_answers(answer), **_refusals(_MISTAKES)}
        return {"operationId": name, "summary": summary, "responses": answers}

    def _guard(
        self,
        name: str,
        scope: str,
        summary: str,
        answers: Json,
        body: Json | None = None,
        errors: str = "",
    ) -> Json:
        """Return an operation that needs a token with ``scope``, where tokens are needed at all."""
        mistakes = {**_MISTAKES, **(_GUARDED if self._guarded else {})}
        operation: Json = {
            "operationId": name,
            "summary": summary,
            "responses": {**answers, **_refusals(mistakes, errors)},
        }
        if body is not None:
            operation["requestBody"] = {"required": True, "content": body}
        if self._guarded:
            operation["security"] = [{"token": [scope]}]
        return operation

    def _named(self, paths: Json) -> Json:
        """Add what the paths have in braces as parameters."""
        for path, item in paths.items():
            names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
            if names:
                item["parameters"] = [
                    {"name": n, "in": "path", "required": True, "schema": _PARTS[n]} for n in names
                ]
        return paths


def _title(model: str) -> str:
    return "Predictions" if model == NAME else f"Predictions of {model}"


def _natural() -> dict[str, Any]:
    return {"type": "integer", "minimum": 0}


def _answers(schema: str) -> Json:
    return {"200": {"description": "It worked.", "content": {_JSON: {"schema": ref(schema)}}}}


def _refusals(codes: Json, kind: str = "") -> Json:
    return {code: ref(f"{kind}{code}", "responses") for code in sorted(codes)}


def _errors(schema: str) -> Json:
    return {
        code: {
            "description": text,
            "content": {_JSON: {"schema": ref(schema)}},
            **({"headers": _HEADERS[code]} if code in _HEADERS else {}),
        }
        for code, text in {**_MISTAKES, **_GUARDED}.items()
    }
