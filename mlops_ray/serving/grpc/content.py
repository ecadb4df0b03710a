"""Tensors in the protocol's messages: raw bytes, or lists of values by type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlops_ray.errors import RequestError
from mlops_ray.serving.endpoint.native import STALE_HEADER
from mlops_ray.serving.formats import tensors
from mlops_ray.serving.formats.answers import Answer
from mlops_ray.serving.formats.inference_protocol import InferenceProtocol, InferRequest
from mlops_ray.serving.formats.refusal import refusal
from mlops_ray.serving.formats.tensors import BYTES, Tensor
from mlops_ray.serving.grpc.messages import message_class

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


def parse(name: str, body: bytes) -> Any:
    """Return the message ``name`` that ``body`` holds. RequestError 400 where it holds none."""
    from google.protobuf.message import DecodeError

    try:
        return message_class(name).FromString(body)
    except DecodeError as error:
        raise RequestError(f"the request is no {name}: {error}", status=400) from error


def read(message: Any, protocol: InferenceProtocol) -> InferRequest:
    """Return the checked request of a ``ModelInferRequest``.

    Raises:
        RequestError: 413 too many rows, 422 anything else.
    """
    for item in (*message.inputs, *message.outputs):
        _refuse_extensions(item)
    raw = message.raw_input_contents
    if len(raw):
        if len(raw) != len(message.inputs):
            text = f"{len(raw)} raw_input_contents came for {len(message.inputs)} inputs"
            raise RequestError(text)
        given = [_raw(item, data) for item, data in zip(message.inputs, raw, strict=True)]
    else:
        given = [_listed(item) for item in message.inputs]
    names = [output.name for output in message.outputs]
    return protocol.request(given, id=message.id, outputs=names or None)


def write(outputs: Sequence[Tensor], answer: Answer, request: Any) -> bytes:
    """Return the ``ModelInferResponse`` with an answer's tensors, raw where the request's were."""
    reply = message_class("ModelInferResponse")(model_name=answer.model, id=request.id)
    if answer.version is not None:
        reply.model_version = str(answer.version)
    if answer.stale:
        name, value = STALE_HEADER
        reply.parameters[name.decode()].string_param = value.decode()
    raw = len(request.raw_input_contents) > 0
    for tensor in outputs:
        item = reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw:
            reply.raw_output_contents.append(tensors.to_raw(tensor))
        else:
            values = tensor.values.ravel().tolist()
            if tensor.datatype == BYTES:
                values = [value.encode() if type(value) is str else value for value in values]
            getattr(item.contents, _CONTENTS[tensor.datatype]).extend(values)
    content: bytes = reply.SerializeToString()
    return content


def timeout_ms(message: Any) -> int | None:
    """Return how long the request says that it may take, rounded up; it says so in microseconds."""
    wanted_us = message.parameters["timeout"].int64_param if "timeout" in message.parameters else 0
    return math.ceil(wanted_us / 1000) if wanted_us > 0 else None


def _raw(item: Any, data: bytes) -> Tensor:
    if item.HasField("contents"):
        raise refusal("has both contents and raw_input_contents", item.name)
    return tensors.from_raw(item.name, item.datatype, tuple(item.shape), data)


def _listed(item: Any) -> Tensor:
    name, datatype = item.name, item.datatype
    dtype = tensors.dtype_of(name, datatype)
    place = _CONTENTS.get(datatype)
    if place is None:
        raise refusal(f"must be in raw_input_contents, as all of {datatype}", name)
    shape = tuple(item.shape)
    count = tensors.count_of(name, shape)
    values = getattr(item.contents, place)
    if len(values) != count:
        raise refusal(f"has {len(values)} values in {place} where its shape needs {count}", name)
    try:
        return Tensor(name, datatype, shape, _array(values, dtype))
    except OverflowError:
        raise refusal(f"has a value that does not fit {datatype}", name) from None


def _array(values: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "O":
        texts = np.empty(len(values), dtype=object)
        texts[:] = list(values)
        return texts
    return np.fromiter(values, dtype, len(values))


def _refuse_extensions(item: Any) -> None:
    # A map's ``in`` adds nothing, while reading a missing key would.
    if "shared_memory_region" in item.parameters:
        raise refusal("is in shared memory, which is not supported", item.name)
    if "classification" in item.parameters:
        raise refusal("cannot be asked for as a classification", item.name)
