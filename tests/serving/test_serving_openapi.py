"""The OpenAPI document: valid, complete, and true to what the schema takes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from serving import shop
from serving.test_serving_request import INPUTS, ROW, as_list, bodies, outcome, some_rows

from mlops_ray.config.features import RequestField
from mlops_ray.config.serving import Security, Serving
from mlops_ray.errors import RequestError
from mlops_ray.serving.formats import openapi
from mlops_ray.serving.formats.answers import Answer, json_answer
from mlops_ray.serving.formats.feedback import parse_feedback
from mlops_ray.serving.formats.inference_protocol import InferenceProtocol
from mlops_ray.serving.formats.request import RequestSchema

ODD = {
    "a b": RequestField(dtype="int", minimum=2.5, maximum=3.5),
    "low": RequestField(dtype="float", maximum=-3),
    "under": RequestField(dtype="int", maximum=-1.5),
    "high": RequestField(dtype="int", minimum=7, nullable=True),
}
SECURE = Serving(security=Security.model_validate({"tokens": "tokens.json"}))
DOCUMENTS = [
    openapi.document("shop", shop.features().services["buys"].inputs, Serving(), "1.0"),
    openapi.document("flights", INPUTS, SECURE, "1.0"),
    openapi.document(openapi.NAME, ODD, Serving(explain=False), "1.0"),
]
DOCUMENT = openapi.document("flights", INPUTS, Serving(max_rows=4), "1.0")
SCHEMA = RequestSchema(INPUTS, max_rows=4)


def validator(document: Any, name: str) -> Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return Draft202012Validator(schema)


def operations(document: Any) -> list[tuple[str, str, Any]]:
    return [
        (path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in ("get", "post")
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_are_valid(document: Any) -> None:
    assert json.loads(json.dumps(document)) == document
    OpenAPIV31SpecValidator(document).validate()
    loaded = schemathesis.openapi.from_dict(document)
    found = {(r.ok().path, r.ok().method) for r in loaded.get_all_operations()}
    assert found == {(path, method) for path, method, _ in operations(document)}


@pytest.mark.parametrize(
    ("document", "inputs"),
    [
        (DOCUMENTS[0], shop.features().services["buys"].inputs),
        (DOCUMENTS[1], INPUTS),
        (DOCUMENTS[2], ODD),
    ],
)
def test_examples_are_taken(document: Any, inputs: dict[str, RequestField]) -> None:
    schema = RequestSchema(inputs, max_rows=4)
    base = next(path for path in document["paths"] if path.endswith("/predict"))
    for path, _, operation in operations(document):
        content = operation.get("requestBody", {"content": {}})["content"]
        for item in content.values():
            examples = [e["value"] for e in item.get("examples", {}).values()]
            for example in examples + ([item["example"]] if "example" in item else []):
                Draft202012Validator(
                    {**item["schema"], "components": document["components"]}
                ).validate(example)
                body = orjson.dumps(example)
                if path.endswith("/feedback"):
                    parse_feedback(body, 4, shop.NOW)
                elif path.endswith("/infer"):
                    InferenceProtocol(schema, "x").read(body, None)
                else:
                    schema.parse(body)
    rows = document["paths"][base]["post"]["requestBody"]["content"]["application/json"]["examples"]
    by_rows, by_columns = (schema.parse(orjson.dumps(e["value"])) for e in rows.values())
    assert as_list(by_rows)[2] == as_list(by_columns)[2]


def test_tokens_are_asked_for_where_they_are_needed() -> None:
    secure, plain = DOCUMENTS[1], DOCUMENTS[0]
    assert not any("security" in operation for _, _, operation in operations(plain))
    needed = {op["operationId"]: op.get("security") for _, _, op in operations(secure)}
    assert needed["predict"] == needed["infer"] == [{"token": ["predict"]}]
    assert needed["feedback"] == [{"token": ["feedback"]}]
    assert needed["modelReady"] == needed["model"] == [{"token": ["metadata"]}]
    assert needed["alive"] is None
    assert needed["serverReady"] is None
    assert needed["document"] is None
    for _, _, operation in operations(secure):
        assert ("401" in operation["responses"]) == ("security" in operation)


def test_what_is_off_is_not_there() -> None:
    paths = [set(document["paths"]) for document in DOCUMENTS]
    assert "/v1/models/shop/explain" in paths[0]
    assert "/v1/models/{name}/predict" in paths[2]
    assert not any(path.endswith("/explain") for path in paths[2])


PREDICT = validator(DOCUMENT, "PredictRequest")


def numbers_as_json_has_them(value: Any) -> bool:
    """Whether JSON Schema and this project mean the same by the numbers: 1.0 is an integer there."""
    if isinstance(value, dict):
        return all(map(numbers_as_json_has_them, value.values()))
    if isinstance(value, list):
        return all(map(numbers_as_json_has_them, value))
    return not (isinstance(value, float) and (not np.isfinite(value) or value.is_integer()))


def agree(body: bytes) -> None:
    request = outcome(lambda: SCHEMA.parse(body))
    if not isinstance(request, RequestError):
        PREDICT.validate(json.loads(body))
        return
    if request.status == 400:
        return
    content = json.loads(body)
    beyond = ("ids", "values where", "ISO 8601", "too large", "finite", "does not fit")
    if numbers_as_json_has_them(content) and not any(text in request.what for text in beyond):
        assert not PREDICT.is_valid(content), request.what


@settings(deadline=None)
@given(st.lists(some_rows, min_size=1, max_size=5))
def test_the_schema_takes_what_the_document_says(rows: list[dict[str, Any]]) -> None:
    agree(json.dumps({"rows": rows}).encode())


@settings(deadline=None)
@given(bodies)
def test_the_schema_takes_what_the_document_says_of_anything(body: bytes) -> None:
    agree(body)


@pytest.mark.parametrize(
    "content",
    [
        {"rows": [{**ROW, "x": 1}]},
        {"rows": [ROW], "x": 1},
        {"rows": [ROW], "columns": {name: [ROW[name]] for name in ROW}},
        {"columns": {**{name: [ROW[name]] for name in ROW}, "x": [1]}},
        {"rows": [{**ROW, "tail": None, "origin": None}]},
        {"rows": [{name: ROW[name] for name in ROW if name != "at"}]},
        {"rows": []},
    ],
)
def test_both_refuse(content: Any) -> None:
    assert isinstance(outcome(lambda: SCHEMA.parse(orjson.dumps(content))), RequestError)
    assert not PREDICT.is_valid(content)


@pytest.mark.parametrize("versions", [None, [3, 4]])
def test_answers_are_as_the_document_says(versions: list[int] | None) -> None:
    one = versions is None
    answer = Answer(
        "flights",
        3 if one else None,
        "champion" if one else None,
        ["a", "b"],
        np.array([0.0, 1.0]),
        [0, 1],
        versions,
        None if one else ["champion", "rival"],
    )
    validator(DOCUMENT, "PredictAnswer").validate(json.loads(json_answer(answer)))
    protocol = InferenceProtocol(SCHEMA, "flights")
    example = DOCUMENT["paths"]["/v2/models/flights/infer"]["post"]["requestBody"]["content"]
    request = protocol.read(orjson.dumps(example["application/json"]["example"]), None)
    reply, _ = protocol.write(request, answer)
    validator(DOCUMENT, "InferAnswer").validate(json.loads(reply))
    validator(DOCUMENT, "Model").validate(protocol.metadata([3]))
