"""The protocol's messages and tensors, against a public client's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import shop
from tritonclient import grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.grpc._utils import _get_inference_request

import mlops_ray.serving.grpc as room
from mlops_ray.errors import RequestError
from mlops_ray.serving.formats.answers import Answer
from mlops_ray.serving.formats.inference_protocol import InferenceProtocol
from mlops_ray.serving.formats.request import PredictRequest, RequestSchema
from mlops_ray.serving.grpc import content, messages
from mlops_ray.serving.grpc.messages import message_class

FOLDER = Path(room.__file__).parent
SCHEMA = RequestSchema(shop.features().services["buys"].inputs, 1024)
PROTOCOL = InferenceProtocol(SCHEMA, "shop")
ANSWER = Answer("shop", 7, "champion", ["a", "é"], np.array([0.25, 0.75]), [0, 1])
NAMES = ["customer", "shop", "amount", "member", "at"]
LISTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT16": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def triton_input(name: str, values: Any, datatype: str) -> triton.InferInput:
    array = np.asarray(values)
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def inputs(rows: int = 2) -> list[triton.InferInput]:
    return [
        triton_input("customer", np.array(["anna", "bert"] * rows, object)[:rows], "BYTES"),
        triton_input("shop", np.arange(rows), "INT64"),
        triton_input("amount", np.linspace(0, 1, rows), "FP64"),
        triton_input("coupon", np.array([b"spring"] * rows, object), "BYTES"),
        triton_input("member", np.array([True] * rows), "BOOL"),
        triton_input("at", np.full(rows, shop.NOW_US), "INT64"),
    ]


def triton_request(given: list[triton.InferInput], **more: Any) -> Any:
    options: dict[str, Any] = {"model_name": "shop", "model_version": "", "request_id": "r1"}
    options |= {"outputs": None, "sequence_id": 0, "sequence_start": False, "sequence_end": False}
    options |= {"priority": 0, "timeout": None, "parameters": None} | more
    return _get_inference_request(inputs=given, **options)


def listed(request: Any) -> Any:
    """The same request with lists of values in place of raw bytes."""
    changed = service_pb2.ModelInferRequest()
    changed.CopyFrom(request)
    del changed.raw_input_contents[:]
    for item, raw in zip(changed.inputs, request.raw_input_contents, strict=True):
        if item.datatype == "BYTES":
            values = triton_texts(raw)
        else:
            dtypes = {"BOOL": np.bool_, "INT64": np.int64, "FP64": np.float64}
            values = np.frombuffer(raw, dtypes[item.datatype]).tolist()
        getattr(item.contents, LISTS[item.datatype]).extend(values)
    return changed


def triton_texts(raw: bytes) -> list[bytes]:
    from tritonclient.utils import deserialize_bytes_tensor

    return list(deserialize_bytes_tensor(raw))


def read(request: Any) -> PredictRequest:
    message = content.parse("ModelInferRequest", request.SerializeToString())
    return content.read(message, PROTOCOL).request


def same_columns(left: PredictRequest, right: PredictRequest) -> None:
    assert left.rows == right.rows
    for name, column in right.columns.items():
        assert left.columns[name].dtype == column.dtype
        assert left.columns[name].tolist() == column.tolist()


def test_descriptors_are_a_part_of_the_protocols() -> None:
    ours = message_class("ModelInferRequest").DESCRIPTOR.file
    theirs = service_pb2.DESCRIPTOR
    assert ours.package == theirs.package

    def compare(mine: Any, wanted: Any) -> None:
        assert mine.full_name == wanted.full_name
        for name, field in mine.fields_by_name.items():
            other = wanted.fields_by_name[name]
            assert (field.number, field.type) == (other.number, other.type)
            assert field.is_repeated == other.is_repeated
            if field.message_type is not None:
                assert field.message_type.full_name == other.message_type.full_name
        for name, nested in mine.nested_types_by_name.items():
            compare(nested, wanted.nested_types_by_name[name])

    assert len(ours.message_types_by_name) == 14
    for name, mine in ours.message_types_by_name.items():
        compare(mine, theirs.message_types_by_name[name])
    service = theirs.services_by_name["GRPCInferenceService"]
    assert service.full_name == messages.SERVICE
    for method in ours.services_by_name["GRPCInferenceService"].methods:
        wanted = service.methods_by_name[method.name]
        assert method.input_type.full_name == wanted.input_type.full_name
        assert method.output_type.full_name == wanted.output_type.full_name


@pytest.mark.parametrize(
    "order",
    [
        "import tritonclient.grpc; m.message_class('ModelInferRequest')",
        "m.message_class('ModelInferRequest'); import tritonclient.grpc",
    ],
)
def test_a_public_client_may_live_in_the_same_process(order: str) -> None:
    code = f"from mlops_ray.serving.grpc import messages as m; {order}; print('both')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "both"


def test_the_descriptors_are_what_the_proto_file_says(tmp_path: Path) -> None:
    from grpc_tools import protoc

    made = tmp_path / "made.binpb"
    arguments = ["protoc", f"-I{FOLDER}", f"--descriptor_set_out={made}", "open_inference.proto"]
    assert protoc.main(arguments) == 0
    assert made.read_bytes() == (FOLDER / "open_inference.binpb").read_bytes()


def test_serve_s_ingress_imports_nothing_heavy_for_it() -> None:
    code = (
        "import sys; from mlops_ray.serving.grpc.service import SERVICER;"
        "print([m for m in ('ray', 'torch', 'pyarrow', 'numpy', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("rows", [1, 2, 1024])
def test_raw_and_listed_tensors_read_like_json(rows: int) -> None:
    import orjson

    columns = {
        "customer": ["anna", "bert"] * rows,
        "shop": list(range(rows)),
        "amount": np.linspace(0, 1, rows).tolist(),
        "coupon": ["spring"] * rows,
        "member": [True] * rows,
        "at": ["2024-03-01T12:00:00Z"] * rows,
    }
    columns = {name: values[:rows] for name, values in columns.items()}
    wanted = SCHEMA.parse(orjson.dumps({"columns": columns}))
    request = triton_request(inputs(rows))
    same_columns(read(request), wanted)
    same_columns(read(listed(request)), wanted)


@given(
    shops=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_values_come_through_unchanged(shops: list[int], data: st.DataObject) -> None:
    rows = len(shops)
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
    customers = data.draw(st.lists(texts, min_size=rows, max_size=rows))
    amounts = data.draw(st.lists(st.floats(0, 1e6), min_size=rows, max_size=rows))
    members = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    changed = inputs(rows)
    changed[0] = triton_input(
        "customer", np.array([c.encode() for c in customers], object), "BYTES"
    )
    changed[1] = triton_input("shop", np.array(shops), "INT64")
    changed[2] = triton_input("amount", np.array(amounts), "FP64")
    changed[4] = triton_input("member", np.array(members), "BOOL")
    for request in (triton_request(changed), listed(triton_request(changed))):
        found = read(request).columns
        assert found["customer"].tolist() == customers
        assert found["shop"].tolist() == shops
        assert found["amount"].tolist() == amounts
        assert found["member"].tolist() == members


@pytest.mark.parametrize("raw", [True, False])
def test_a_public_client_reads_the_answer(raw: bool) -> None:
    given = triton_request(inputs())
    given = given if raw else listed(given)
    message = content.parse("ModelInferRequest", given.SerializeToString())
    request = content.read(message, PROTOCOL)
    written = content.write(PROTOCOL.outputs(request, ANSWER), ANSWER, message)
    response = service_pb2.ModelInferResponse.FromString(written)
    assert (response.model_name, response.model_version, response.id) == ("shop", "7", "r1")
    assert (len(response.raw_output_contents) > 0) is raw
    if not raw:  # the client reads raw tensors only, as that is how it sends them
        lists = [item.contents for item in response.outputs]
        assert list(lists[0].fp64_contents) == [0.25, 0.75]
        assert list(lists[1].int64_contents) == [0, 1]
        assert list(lists[2].bytes_contents) == [b"a", "é".encode()]
        assert list(lists[3].int64_contents) == [7, 7]
        return
    result = triton.InferResult(response)
    assert result.as_numpy("score").tolist() == [0.25, 0.75]
    assert result.as_numpy("label").tolist() == [0, 1]
    assert result.as_numpy("version").tolist() == [7, 7]
    assert [text.decode() for text in result.as_numpy("id").tolist()] == ["a", "é"]


def test_only_the_outputs_that_are_wanted() -> None:
    wanted = [triton.InferRequestedOutput(name) for name in ("label", "score")]
    given = triton_request(inputs(), outputs=wanted)
    message = content.parse("ModelInferRequest", given.SerializeToString())
    outputs = PROTOCOL.outputs(content.read(message, PROTOCOL), ANSWER)
    assert [tensor.name for tensor in outputs] == ["label", "score"]


def test_ids_are_a_tensor_and_a_time_limit_a_parameter() -> None:
    named = triton_input("id", np.array([b"x", b"y"], object), "BYTES")
    request = triton_request([*inputs(), named], timeout=1500)
    assert read(request).ids == ["x", "y"]
    message = content.parse("ModelInferRequest", request.SerializeToString())
    assert content.timeout_ms(message) == 2
    bare = content.parse("ModelInferRequest", triton_request(inputs()).SerializeToString())
    assert content.timeout_ms(bare) is None


def flawed(change: str) -> Any:
    request = triton_request(inputs())
    amount = request.inputs[2]
    if change == "unknown input":
        amount.name = "amuont"
    elif change == "missing input":
        del request.inputs[2], request.raw_input_contents[2]
    elif change == "twice":
        request.inputs[3].CopyFrom(amount)
        request.raw_input_contents[3] = request.raw_input_contents[2]
    elif change == "other shape":
        amount.shape[0] = 3
    elif change == "negative shape":
        amount.shape[0] = -1
    elif change == "huge shape":
        amount.shape[:] = [2**62, 2**62]
    elif change == "no shape":
        del amount.shape[:]
    elif change == "a matrix":
        amount.shape[:] = [1, 2]
    elif change == "unknown datatype":
        amount.datatype = "FP80"
    elif change == "too few raw":
        del request.raw_input_contents[5]
    elif change == "both forms":
        amount.contents.fp64_contents.append(1.0)
    elif change == "shared memory":
        amount.parameters["shared_memory_region"].string_param = "x"
    elif change == "not a number":
        request.raw_input_contents[2] = np.array([np.nan, 1.0]).tobytes()
    elif change == "out of range":
        request.raw_input_contents[2] = np.array([0.0, -1.0]).tobytes()
    elif change == "unknown output":
        request.outputs.add(name="scroe")
    elif change == "classification":
        request.outputs.add(name="score").parameters["classification"].int64_param = 1
    else:
        request = listed(request)
        amount = request.inputs[2]
        if change == "wrong list":
            amount.contents.fp32_contents.extend([1.0, 2.0])
            del amount.contents.fp64_contents[:]
        elif change == "half as a list":
            amount.datatype = "FP16"
        elif change == "does not fit":
            request.inputs[1].datatype = "INT8"
            request.inputs[1].contents.int_contents.extend([1, 200])
        else:
            assert change == "too short a list"
            del amount.contents.fp64_contents[0]
    return request


@pytest.mark.parametrize(
    ("change", "field", "row"),
    [
        ("unknown input", "amuont", None),
        ("missing input", "amount", None),
        ("twice", "amount", None),
        ("other shape", "amount", None),
        ("negative shape", "amount", None),
        ("huge shape", "amount", None),
        ("no shape", "amount", None),
        ("a matrix", "amount", None),
        ("unknown datatype", None, None),
        ("too few raw", None, None),
        ("both forms", "amount", None),
        ("shared memory", "amount", None),
        ("not a number", "amount", 0),
        ("out of range", "amount", 1),
        ("unknown output", None, None),
        ("classification", "score", None),
        ("wrong list", "amount", None),
        ("half as a list", "amount", None),
        ("does not fit", "shop", None),
        ("too short a list", "amount", None),
    ],
)
def test_flaws_are_refused_by_field_and_row(
    change: str, field: str | None, row: int | None
) -> None:
    with pytest.raises(RequestError) as caught:
        read(flawed(change))
    assert caught.value.status == 422
    if field is not None:
        assert caught.value.field == field
    if row is not None:
        assert caught.value.row == row


@pytest.mark.parametrize("raw", [True, False])
def test_a_shape_of_many_sizes_is_not_multiplied_out(raw: bool) -> None:
    request = triton_request(inputs()) if raw else listed(triton_request(inputs()))
    request.inputs[2].shape[:] = [2] + [1] * 8
    with pytest.raises(RequestError, match="shape of 1 to 8 sizes") as caught:
        read(request)
    assert (caught.value.status, caught.value.field) == (422, request.inputs[2].name)


VALID = triton_request(inputs()).SerializeToString()
LISTED = listed(triton_request(inputs())).SerializeToString()


@given(
    start=st.sampled_from([VALID, LISTED, b""]),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2), st.binary(max_size=4))),
)
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_read_or_refused(start: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    body = bytearray(start)
    for place, removed, added in edits:
        place %= len(body) + 1
        body[place : place + removed] = added
    outcome: PredictRequest | RequestError
    try:
        outcome = content.read(content.parse("ModelInferRequest", bytes(body)), PROTOCOL).request
    except RequestError as error:
        outcome = error
    if isinstance(outcome, RequestError):
        assert outcome.status in (400, 413, 422)
    else:
        assert set(outcome.columns) == set(SCHEMA.inputs)
        assert {len(column) for column in outcome.columns.values()} == {outcome.rows}


@given(st.sampled_from(sorted(LISTS)), st.lists(st.integers(0, 100), min_size=2, max_size=2))
def test_lists_of_each_datatype(datatype: str, values: list[int]) -> None:
    request = service_pb2.ModelInferRequest()
    item = request.inputs.add(name="x", datatype=datatype, shape=[2])
    kinds = {"BOOL": bool, "FP32": float, "FP64": float, "BYTES": lambda v: str(v).encode()}
    typed = [kinds.get(datatype, int)(value) for value in values]
    getattr(item.contents, LISTS[datatype]).extend(typed)
    message = content.parse("ModelInferRequest", request.SerializeToString())
    tensor = content._listed(message.inputs[0])
    assert tensor.values.tolist() == typed
