"""The Open Inference Protocol, written and read by Triton's own client library."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from serving.test_serving_request import as_list, outcome
from tritonclient.http import InferInput, InferRequestedOutput, InferResult
from tritonclient.http._utils import _get_inference_request
from tritonclient.utils import np_to_triton_dtype

from mlops_ray.config.features import RequestField
from mlops_ray.errors import RequestError
from mlops_ray.serving.formats import tensors
from mlops_ray.serving.formats.answers import Answer
from mlops_ray.serving.formats.inference_protocol import (
    HEADER_LENGTH,
    InferenceProtocol,
    server_metadata,
)
from mlops_ray.serving.formats.request import RequestSchema

INPUTS = {
    "origin": RequestField(dtype="string"),
    "gate": RequestField(dtype="int", minimum=-5, nullable=True),
    "wind": RequestField(dtype="float", nullable=True),
    "distance": RequestField(dtype="float", minimum=0),
    "late": RequestField(dtype="bool"),
    "at": RequestField(dtype="timestamp"),
}
SCHEMA = RequestSchema(INPUTS, max_rows=4)
PROTOCOL = InferenceProtocol(SCHEMA, "flights")
NOON_US = 1_709_294_400_000_000
ARRAYS: dict[str, NDArray[Any]] = {
    "origin": np.array(["EWR", "ä"], dtype=object),
    "gate": np.array([3, -4], np.int64),
    "wind": np.array([1.5, np.nan]),
    "distance": np.array([1.0, 2.5]),
    "late": np.array([True, False]),
    "at": np.array([NOON_US, NOON_US + 1]),
}
ROWS = [
    {"origin": "EWR", "gate": 3, "wind": 1.5, "distance": 1.0, "late": True},
    {"origin": "ä", "gate": -4, "wind": None, "distance": 2.5, "late": False},
]
TIMES = ["2024-03-01T12:00:00Z", "2024-03-01T12:00:00.000001Z"]
BY_JSON = SCHEMA.parse(
    orjson.dumps({"rows": [{**row, "at": at} for row, at in zip(ROWS, TIMES, strict=True)]})
)
ANSWER = Answer("flights", 7, "champion", ["p1", "ä2"], np.array([0.25, 0.75]), [0, 1])


def written(
    arrays: dict[str, NDArray[Any]],
    *,
    binary: bool = True,
    outputs: dict[str, bool] | None = None,
    **more: Any,
) -> tuple[bytes, int | None]:
    """What Triton's client sends."""
    inputs = []
    for name, array in arrays.items():
        item = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        inputs.append(item.set_data_from_numpy(array, binary_data=binary))
    wanted = [InferRequestedOutput(n, binary_data=b) for n, b in (outputs or {}).items()]
    options: dict[str, Any] = {
        "request_id": "",
        "sequence_id": 0,
        "sequence_start": False,
        "sequence_end": False,
        "priority": 0,
        "timeout": None,
        "custom_parameters": None,
    }
    return _get_inference_request(inputs=inputs, outputs=wanted, **{**options, **more})


def read_back(reply: tuple[bytes, list[tuple[bytes, bytes]]]) -> InferResult:
    body, headers = reply
    length = dict(headers).get(HEADER_LENGTH)
    return InferResult.from_response_body(body, header_length=length)


def refused(body: bytes, length: int | None = None) -> tuple[int, str | None, int | None]:
    with pytest.raises(RequestError) as caught:
        PROTOCOL.read(body, length)
    return caught.value.status, caught.value.field, caught.value.row


def test_binary_tensors_of_tritons_client_are_read() -> None:
    found = PROTOCOL.read(*written(ARRAYS, request_id="r-1", timeout=5_000))
    assert as_list(found.request) == as_list(BY_JSON)
    assert found.id == "r-1"
    assert found.binary == dict.fromkeys(["score", "label", "id", "version"], True)


def test_tensors_of_tritons_client_in_json_are_read() -> None:
    arrays = {**ARRAYS, "wind": np.array([1.5, 0.0]), "wind.valid": np.array([True, False])}
    body, length = written(arrays, binary=False, outputs={"label": False, "score": True})
    assert length is None
    found = PROTOCOL.read(body, length)
    assert as_list(found.request) == as_list(BY_JSON)
    assert list(found.binary.items()) == [("label", False), ("score", True)]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize(
    "kinds",
    [
        {"gate": np.int8, "distance": np.float32, "wind": np.float16},
        {"gate": np.int16, "distance": np.uint8, "wind": np.float32},
        {"gate": np.int32, "distance": np.uint64},
    ],
)
def test_other_datatypes_and_shapes_of_the_same_meaning(
    kinds: dict[str, Any], columns: int
) -> None:
    arrays = {**ARRAYS, "distance": np.array([1.0, 2.0])}
    arrays = {n: a.astype(kinds.get(n, a.dtype)) for n, a in arrays.items()}
    shaped = {n: a.reshape(2, 1) if columns == 2 else a for n, a in arrays.items()}
    found = PROTOCOL.read(*written(shaped)).request
    assert found.columns["distance"].tolist() == [1.0, 2.0]
    assert found.columns["gate"].tolist() == [3, -4]
    assert found.columns["wind"][0] == 1.5
    assert np.isnan(found.columns["wind"][1])
    assert {c.dtype for c in (found.columns["distance"], found.columns["wind"])} == {
        np.dtype(float)
    }


def test_times_may_be_texts_and_ids_are_taken() -> None:
    arrays = {**ARRAYS, "at": np.array(TIMES, dtype=object), "id": np.array(["a", "b"], object)}
    found = PROTOCOL.read(*written(arrays))
    assert found.request.ids == ["a", "b"]
    assert as_list(found.request)[2] == as_list(BY_JSON)[2]


def test_nulls_in_json_and_nested_data() -> None:
    tensors_ = [
        {"name": "origin", "shape": [2], "datatype": "BYTES", "data": ["EWR", "ä"]},
        {"name": "gate", "shape": [2, 1], "datatype": "INT64", "data": [[3], [None]]},
        {"name": "wind", "shape": [2], "datatype": "FP32", "data": [1, None]},
        {"name": "distance", "shape": [2], "datatype": "FP64", "data": [1, 2.5]},
        {"name": "late", "shape": [2], "datatype": "BOOL", "data": [True, False]},
        {"name": "at", "shape": [2], "datatype": "BYTES", "data": TIMES},
    ]
    found = PROTOCOL.read(orjson.dumps({"inputs": tensors_, "parameters": {"x": 1}}), None)
    assert found.request.columns["gate"].tolist() == [3, None]
    assert np.isnan(found.request.columns["wind"][1])
    assert not any(found.binary.values())


@pytest.mark.parametrize("outputs", [None, {"id": False, "score": True}, {"version": False}])
def test_replies_are_read_by_tritons_client(outputs: dict[str, bool] | None) -> None:
    request = PROTOCOL.read(*written(ARRAYS, outputs=outputs, request_id="r-2"))
    result = read_back(PROTOCOL.write(request, ANSWER))
    content = result.get_response()
    assert (content["model_name"], content["model_version"]) == ("flights", "7")
    assert content["id"] == "r-2"
    names = list(outputs or ["score", "label", "id", "version"])
    assert [output["name"] for output in content["outputs"]] == names
    expected = {
        "score": [0.25, 0.75],
        "label": [0, 1],
        "id": [b"p1", "ä2".encode()],
        "version": [7, 7],
    }
    for name in names:
        found = result.as_numpy(name).tolist()
        texts = [v.encode() if isinstance(v, str) else v for v in found]
        assert texts == expected[name]


def test_rows_of_several_versions() -> None:
    answer = Answer(
        "flights", None, None, ["a", "b"], ANSWER.scores, [0, 1], [7, 8], ["champion", "rival"]
    )
    result = read_back(PROTOCOL.write(PROTOCOL.read(*written(ARRAYS)), answer))
    assert result.as_numpy("version").tolist() == [7, 8]
    assert "model_version" not in result.get_response()


@settings(deadline=None)
@given(st.sampled_from(sorted(set(tensors.DATATYPES) - {"BYTES"})), st.data())
def test_raw_numbers_are_as_tritons_client_writes_them(datatype: str, data: Any) -> None:
    dtype = tensors.DATATYPES[datatype]
    raw = data.draw(st.binary(min_size=dtype.itemsize, max_size=64))
    raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    array = np.frombuffer(raw, dtype) if datatype != "BOOL" else np.frombuffer(raw, np.int8) > 0
    item = InferInput("x", list(array.shape), np_to_triton_dtype(array.dtype))
    sent = item.set_data_from_numpy(array)._get_binary_data()
    assert item.datatype() == datatype
    tensor = tensors.from_raw("x", datatype, array.shape, sent)
    np.testing.assert_array_equal(tensor.values, array)
    assert tensors.to_raw(tensor) == sent


@settings(deadline=None)
@given(st.lists(st.text(max_size=5), max_size=6))
def test_raw_texts_are_as_tritons_client_writes_them(texts: list[str]) -> None:
    array = np.array([text.encode() for text in texts], dtype=object)
    sent = InferInput("x", [len(texts)], "BYTES").set_data_from_numpy(array)._get_binary_data()
    tensor = tensors.from_raw("x", "BYTES", [len(texts)], sent)
    assert tensor.values.tolist() == array.tolist()
    assert tensors.to_raw(tensor) == sent


def one(name: str, datatype: str, shape: Any, data: Any = None, **parameters: Any) -> Any:
    """A sound request in JSON in which one tensor is replaced."""
    body, _ = written({n: a for n, a in ARRAYS.items() if n != "wind"}, binary=False)
    content = orjson.loads(body)
    content["inputs"].append({"name": "wind", "shape": [2], "datatype": "FP64", "data": [1.0, 2.0]})
    content["inputs"] = [t for t in content["inputs"] if t["name"] != name]
    tensor = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
    content["inputs"].append(tensor if data is None else {**tensor, "data": data})
    return content


@pytest.mark.parametrize(
    ("content", "status", "field", "row"),
    [
        ([], 400, None, None),
        ({}, 400, None, None),
        ({"inputs": 1}, 400, None, None),
        ({"inputs": [1]}, 400, None, None),
        ({"inputs": []}, 422, "origin", None),
        (one("gate", "INT99", [2], [1, 2]), 422, "INT99", None),
        (one("gate", "INT8", [2], [1, 300]), 422, "gate", None),
        (one("gate", "UINT8", [2], [1, -1]), 422, "gate", None),
        (one("gate", "INT64", [2], [1, -6]), 422, "gate", 1),
        (one("gate", "INT64", [2], [1.0, 2.0]), 422, "gate", 0),
        (one("gate", "INT64", [2], [1, True]), 422, "gate", 1),
        (one("gate", "INT64", [2], [1]), 422, "gate", None),
        (one("gate", "INT64", [3], [1, 2, 3]), 422, "gate", None),
        (one("gate", "INT64", [2, 2], [1, 2, 3, 4]), 422, "gate", None),
        (one("gate", "INT64", [2, 1, 1], [1, 2]), 422, "gate", None),
        (one("gate", "INT64", [], [1]), 422, "gate", None),
        (one("gate", "INT64", [-2], [1, 2]), 400, None, None),
        (one("gate", "INT64", [2**62], [1, 2]), 400, None, None),
        (one("gate", "INT64", [2], None), 422, "gate", None),
        (one("gate", "INT64", [2], {"a": 1}), 400, None, None),
        (one("gate", "INT64", [2], [[1], 2]), 422, "gate", 0),
        (one("gate", "INT64", [2, 1], [[1], 2]), 422, "gate", None),
        (one("gate", "INT64", [2], binary_data_size=16), 422, "gate", None),
        (one("gate", "INT64", [2], binary_data_size=-1), 400, None, None),
        (one("gate", "INT64", [2], shared_memory_region="x"), 422, "gate", None),
        (one("distance", "FP64", [2], [1, None]), 422, "distance", 1),
        (one("distance", "FP16", [2], [1, 1e6]), 422, "distance", 1),
        (one("distance", "FP64", [2], [1, 10**400]), 422, "distance", None),
        (one("distance", "BYTES", [2], ["1", "2"]), 422, "distance", None),
        (one("at", "FP64", [2], [1.0, 2.0]), 422, "at", None),
        (one("at", "INT64", [2], [0, 2**62]), 422, "at", 1),
        (one("at", "BYTES", [2], [TIMES[0], "soon"]), 422, "at", 1),
        (one("late", "INT8", [2], [0, 1]), 422, "late", None),
        (one("id", "BYTES", [2], ["a", "a"]), 422, "ids", 1),
        (one("distnce", "FP64", [2], [1, 2]), 422, "distnce", None),
        ({**one("gate", "INT64", [2], [1, 2]), "outputs": [{"name": "scor"}]}, 422, "scor", None),
    ],
)
def test_wrong_requests_are_named(
    content: Any, status: int, field: str | None, row: int | None
) -> None:
    assert refused(as_json(content)) == (status, field, row)


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def test_too_many_rows_are_refused() -> None:
    many = {name: np.repeat(array, 3) for name, array in ARRAYS.items()}
    assert refused(*written(many))[0] == 413


@pytest.mark.parametrize("change", [-1, 1, 7])
def test_sizes_that_lie_are_refused(change: int) -> None:
    body, length = written(ARRAYS)
    assert length is not None
    assert refused(body[:-1], length)[0] in (400, 422)
    assert refused(body + b"x", length)[0] == 400
    assert refused(body, length + change)[0] == 400
    assert refused(body, len(body) + 1)[0] == 400
    assert refused(body, -1)[0] == 400


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<I", 2**32 - 1) + b"ab",
        struct.pack("<I", 2) + b"ab",
        struct.pack("<I2sI2sI", 2, b"ab", 2, b"cd", 0),
        struct.pack("<I2sI2s", 2, b"ab", 3, b"cd"),
        struct.pack("<I2sH", 2, b"ab", 0),
    ],
)
def test_lengths_of_texts_that_lie_are_refused(data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        tensors.from_raw("x", "BYTES", [2], data)
    assert (caught.value.status, caught.value.field) == (422, "x")


@pytest.mark.parametrize(("datatype", "size"), [("INT32", 4), ("FP64", 8), ("BOOL", 1)])
def test_sizes_of_numbers_that_lie_are_refused(datatype: str, size: int) -> None:
    for count in (0, 2 * size - 1, 2 * size + 1, 3 * size):
        with pytest.raises(RequestError) as caught:
            tensors.from_raw("x", datatype, [2], bytes(count))
        assert (caught.value.status, caught.value.field) == (422, "x")


def test_texts_must_be_utf8() -> None:
    arrays = {**ARRAYS, "origin": np.array([b"ok", b"\xff"], dtype=object)}
    assert refused(*written(arrays)) == (422, "origin", 1)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.binary(max_size=40))
def test_any_bytes_give_a_request_or_a_refusal(seed: int, noise: bytes) -> None:
    chance = np.random.default_rng(seed)
    body, length = written(ARRAYS)
    content = bytearray(body)
    for _ in range(chance.integers(1, 5)):
        content[chance.integers(len(content))] = chance.integers(256)
    for given_body, header in ((bytes(content), length), (noise, None), (noise, len(noise) // 2)):
        found = outcome(lambda b=given_body, h=header: PROTOCOL.read(b, h))
        if isinstance(found, RequestError):
            assert found.status in (400, 413, 422)


def test_metadata_says_what_is_taken() -> None:
    content = PROTOCOL.metadata([7, 8])
    assert (content["name"], content["versions"]) == ("flights", ["7", "8"])
    arrays = {
        item["name"]: ARRAYS[item["name"]].astype(tensors.DATATYPES[item["datatype"]])
        for item in content["inputs"]
    }
    request = PROTOCOL.read(*written(arrays))
    assert as_list(request.request) == as_list(BY_JSON)
    result = read_back(PROTOCOL.write(request, ANSWER)).get_response()
    described = {(o["name"], o["datatype"], tuple(o["shape"])) for o in content["outputs"]}
    assert described == {(o["name"], o["datatype"], (-1,)) for o in result["outputs"]}
    assert server_metadata("1.2")["extensions"] == ["binary_tensor_data"]


def test_tensors_that_were_read_elsewhere() -> None:
    given_tensors = [
        tensors.Tensor(name, np_to_triton_dtype(array.dtype), array.shape, array)
        for name, array in ARRAYS.items()
    ]
    request = PROTOCOL.request(given_tensors, id="r", outputs=["label"])
    assert as_list(request.request) == as_list(BY_JSON)
    (label,) = PROTOCOL.outputs(request, ANSWER)
    assert (label.name, label.datatype, label.shape) == ("label", "INT64", (2,))
    with pytest.raises(RequestError, match="twice"):
        PROTOCOL.request([*given_tensors, given_tensors[0]])
    lying = tensors.Tensor("gate", "INT64", (3,), ARRAYS["gate"])
    with pytest.raises(RequestError, match="gate has 2 values"):
        PROTOCOL.request([*given_tensors[2:], lying])


def test_data_in_two_places_is_refused() -> None:
    item = {"name": "gate", "shape": [0], "datatype": "INT64", "data": [1]}
    item["parameters"] = {"binary_data_size": 0}
    with pytest.raises(RequestError, match="both") as caught:
        PROTOCOL.read(json.dumps({"inputs": [item]}).encode(), None)
    assert caught.value.status == 400
