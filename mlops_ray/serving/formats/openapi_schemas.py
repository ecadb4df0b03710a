"""The parts of an OpenAPI document: bodies of requests and answers, errors, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlops_ray.config.features import RequestField
from mlops_ray.serving.formats import tensors
from mlops_ray.serving.formats.fields import INT64_MAX, INT64_MIN, whole_bounds
from mlops_ray.serving.formats.inference_protocol import OUTPUTS
from mlops_ray.serving.formats.json_body import MAX_ID_LENGTH

Json = dict[str, Any]
Inputs = Mapping[str, RequestField]

_EXAMPLE_TIME = "2024-03-01T12:00:00Z"
_EXAMPLE_TIME_US = 1_709_294_400_000_000
_ID: Json = {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}
_KINDS: Mapping[str, Json] = {
    "string": {"type": "string"},
    "int": {"type": "integer", "format": "int64", "minimum": INT64_MIN, "maximum": INT64_MAX},
    "float": {"type": "number", "format": "double"},
    "bool": {"type": "boolean"},
    "timestamp": {
        "type": "string",
        "format": "date-time",
        "description": "ISO 8601; without an offset it is UTC",
    },
}


def ref(name: str, kind: str = "schemas") -> Json:
    """Return a reference to a component."""
    return {"$ref": f"#/components/{kind}/{name}"}


def schemas(inputs: Inputs, max_rows: int) -> Json:
    """Return the schemas of all bodies, by name."""
    values = {name: _value(field) for name, field in inputs.items()}
    lists = {name: _list(value, max_rows, least=1) for name, value in values.items()}
    ids = {"type": ["array", "null"], "items": _ID, "uniqueItems": True, "maxItems": max_rows}
    rows = _list(ref("Row"), max_rows, least=1)
    return {
        "Row": _object(values),
        "Columns": _object(lists),
        "PredictRequest": {
            "oneOf": [
                _object({"rows": rows, "ids": ids}, required=["rows"]),
                _object({"columns": ref("Columns"), "ids": ids}, required=["columns"]),
            ],
            "description": "ids: one for each row; made here where they are left out",
        },
        "PredictAnswer": _answer(),
        "ExplainAnswer": _explanation(),
        "FeedbackRequest": _object({"labels": _list(ref("Label"), max_rows, least=1)}),
        "Label": _label(),
        "FeedbackAnswer": _open({"accepted": {"type": "integer"}}),
        "Status": _open({"status": {"type": "string"}}),
        "Metadata": _open({"model": {"type": "string"}, "versions": {"type": "object"}}),
        "Error": _open({"error": _error()}),
        **_protocol(inputs),
    }


def example_row(inputs: Inputs) -> Json:
    """Return a row that is as declared."""
    return {name: _example(field) for name, field in inputs.items()}


def example_infer(inputs: Inputs) -> Json:
    """Return a request of the Open Inference Protocol that is as declared."""
    return {
        "id": "request-1",
        "inputs": [
            {
                "name": name,
                "shape": [1],
                "datatype": tensors.DATATYPE_OF[field.dtype],
                "data": [_EXAMPLE_TIME_US if field.dtype == "timestamp" else _example(field)],
            }
            for name, field in inputs.items()
        ],
        "outputs": [{"name": "score"}],
    }


def _object(properties: Json, required: list[str] | None = None) -> Json:
    return {**_open(properties, required), "additionalProperties": False}


def _open(properties: Json, required: list[str] | None = None) -> Json:
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed}


def _list(items: Json, most: int | None = None, least: int = 0) -> Json:
    bounds = {"minItems": least} if most is None else {"minItems": least, "maxItems": most}
    return {"type": "array", "items": items, **bounds}


def _value(field: RequestField) -> Json:
    schema = dict(_KINDS[field.dtype])
    if field.minimum is not None:
        schema["minimum"] = field.minimum
    if field.maximum is not None:
        schema["maximum"] = field.maximum
    if field.nullable:
        schema["type"] = [schema["type"], "null"]
    return schema


def _example(field: RequestField) -> Any:
    if field.dtype in ("int", "float"):
        whole = field.dtype == "int"
        low, high = whole_bounds(field) if whole else (field.minimum, field.maximum)
        value = max(0, low) if low is not None else 0
        value = min(value, high) if high is not None else value
        return value if whole else float(value)
    return {"string": "text", "bool": True, "timestamp": _EXAMPLE_TIME}[field.dtype]


def _answer() -> Json:
    fields: Json = {
        "model": {"type": "string"},
        "version": {"type": ["integer", "null"]},
        "route": {"type": ["string", "null"], "description": "the alias that answered"},
        "ids": _list(_ID),
        "scores": _list({"type": "number", "minimum": 0, "maximum": 1}),
        "labels": _list({"enum": [0, 1]}),
    }
    by_row = {"versions": _list({"type": "integer"}), "routes": _list({"type": "string"})}
    text = "versions and routes are there where rows were answered by different models"
    return {**_open({**fields, **by_row}, required=list(fields)), "description": text}


def _explanation() -> Json:
    numbers = _list({"type": "number"})
    fields: Json = {
        "model": {"type": "string"},
        "version": {"type": "integer"},
        "route": {"type": "string"},
        "ids": _list(_ID),
        "scores": _list({"type": "number", "minimum": 0, "maximum": 1}),
        "base": {"type": "number", "description": "the log-odds of the score of an average row"},
        "contributions": {"type": "object", "additionalProperties": numbers},
    }
    text = "For each row, base and the contributions of all features sum to the score's log-odds."
    return {**_open(fields), "description": text}


def _label() -> Json:
    known_at = {**_KINDS["timestamp"], "type": ["string", "null"]}
    known_at["description"] = "when the label became known; now, where it is left out"
    fields = {"id": _ID, "label": {"enum": [0, 1, False, True]}, "known_at": known_at}
    return _object(fields, required=["id", "label"])


def _error() -> Json:
    return _open(
        {
            "message": {"type": "string"},
            "field": {"type": ["string", "null"]},
            "row": {"type": ["integer", "null"], "minimum": 0},
        }
    )


def _protocol(inputs: Inputs) -> Json:
    datatype = {"enum": list(tensors.DATATYPES)}
    shape = _list({"type": "integer"}, 2, least=1)
    sizes = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    parameters = {"type": "object"}
    name_of_input = {"type": "string", "description": ", ".join(inputs)}
    tensor = _open(
        {
            "name": name_of_input,
            "shape": {**sizes, "maxItems": 2},
            "datatype": datatype,
            "parameters": parameters,
            "data": {"type": "array"},
        },
        required=["name", "shape", "datatype"],
    )
    wanted = _open({"name": {"enum": list(OUTPUTS)}, "parameters": parameters}, ["name"])
    described = _open({"name": {"type": "string"}, "datatype": datatype, "shape": shape})
    output = _open({"name": {"enum": list(OUTPUTS)}, "datatype": datatype, "shape": shape})
    request = {
        "id": {"type": "string"},
        "parameters": parameters,
        "inputs": _list(tensor, least=1),
        "outputs": _list(wanted),
    }
    reply = {"model_name": {"type": "string"}, "outputs": _list(output)}
    texts = _list({"type": "string"})
    server = {"name": {"type": "string"}, "version": {"type": "string"}, "extensions": texts}
    model = {
        "name": {"type": "string"},
        "versions": texts,
        "platform": {"type": "string"},
        "inputs": _list(described),
        "outputs": _list(described),
    }
    return {
        "InferRequest": _open(request, required=["inputs"]),
        "InferAnswer": _open(reply),
        "Server": _open(server),
        "Model": _open(model),
        "Health": {"type": "object", "additionalProperties": {"type": "boolean"}},
        "ProtocolError": _open({"error": {"type": "string"}}),
    }
