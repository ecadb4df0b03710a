"""The Open Inference Protocol, version 2: requests and replies in JSON, with binary tensors behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from mlops_ray.errors import RequestError
from mlops_ray.serving.formats import tensors
from mlops_ray.serving.formats.answers import Answer
from mlops_ray.serving.formats.json_body import decode
from mlops_ray.serving.formats.refusal import refusal, refuse_unknown
from mlops_ray.serving.formats.request import ID, VALID, PredictRequest, RequestSchema
from mlops_ray.serving.formats.tensors import BYTES, Tensor

HEADER_LENGTH = b"inference-header-content-length"
"""The header that says where JSON ends and binary tensors begin."""
SERVER = "mlops-ray"
EXTENSIONS = ("binary_tensor_data",)
PLATFORM = "mlops_ray"
OUTPUTS = {"score": "FP64", "label": "INT64", "id": BYTES, "version": "INT64"}
_DEFAULT_OUTPUTS = tuple(OUTPUTS)

Size = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class _Parameters(msgspec.Struct):
    binary_data_size: Size | None = None
    binary_data: bool | None = None
    binary_data_output: bool = False
    shared_memory_region: Any = None
    classification: Any = None


class _Input(msgspec.Struct):
    name: str
    shape: list[Size]
    datatype: str
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)
    data: list[Any] | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


class _Body(msgspec.Struct):
    inputs: list[_Input]
    outputs: list[_Output] = []
    id: str = ""
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A checked request; ``binary`` says for each wanted output whether its tensor is to be binary."""

    request: PredictRequest
    id: str
    binary: dict[str, bool]


class InferenceProtocol:
    """Requests and replies of one model. Each input of ``schema`` is a tensor ``[n]`` or ``[n, 1]``;
    the outputs are ``score``, ``label``, ``id`` and ``version``, each ``[n]``.
    """

    def __init__(self, schema: RequestSchema, model: str) -> None:
        self._schema = schema
        self._model = model
        self._decoder = msgspec.json.Decoder(_Body)

    def read(self, body: bytes, header_length: int | None) -> InferRequest:
        """Return the request in ``body``, whose first ``header_length`` bytes are JSON; None: all.

        Raises:
            RequestError: 400 no request of the protocol, 413 too many rows, 422 anything else.
        """
        header, data = _split(body, header_length)
        content = self._decoded(header)
        given: list[Tensor] = []
        place = 0
        for item in content.inputs:
            size = item.parameters.binary_data_size
            _refuse_extensions(item.parameters, item.name)
            if size is None:
                given += _from_json(item)
                continue
            if item.data is not None:
                text = f"{item.name[:80]} has both data and binary_data_size"
                raise RequestError(text, status=400)
            piece = data[place : place + size]
            place += size
            given.append(tensors.from_raw(item.name, item.datatype, item.shape, piece))
        if place != len(data):
            text = f"the inputs have {place} bytes of binary data; {len(data)} came"
            raise RequestError(text, status=400)
        return InferRequest(self._checked(given), content.id, _wanted(content))

    def request(
        self, given: Sequence[Tensor], *, id: str = "", outputs: Iterable[str] | None = None
    ) -> InferRequest:
        """Return the request of tensors that were read elsewhere; ``outputs`` None: all.

        Raises:
            RequestError: 413 too many rows, 422 anything else.
        """
        names = list(outputs or ()) or list(_DEFAULT_OUTPUTS)
        return InferRequest(self._checked(given), id, {_output(name): True for name in names})

    def outputs(self, request: InferRequest, answer: Answer) -> list[Tensor]:
        """Return the tensors of ``answer`` that were asked for, in the order asked for."""
        return [_tensor(name, answer) for name in request.binary]

    def write(
        self, request: InferRequest, answer: Answer
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Return the reply's body and its headers that depend on the form: content type, lengths."""
        outputs: list[dict[str, Any]] = []
        pieces: list[bytes] = []
        for tensor in self.outputs(request, answer):
            output: dict[str, Any] = {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": tensor.shape,
            }
            if request.binary[tensor.name]:
                pieces.append(tensors.to_raw(tensor))
                output["parameters"] = {"binary_data_size": len(pieces[-1])}
            else:
                output["data"] = tensors.to_json(tensor)
            outputs.append(output)
        content = {"model_name": answer.model, "outputs": outputs}
        if answer.version is not None:
            content["model_version"] = str(answer.version)
        if request.id:
            content["id"] = request.id
        header = orjson.dumps(content)
        if not pieces:
            return header, [(b"content-type", b"application/json")]
        headers = [
            (b"content-type", b"application/octet-stream"),
            (HEADER_LENGTH, b"%d" % len(header)),
        ]
        return b"".join((header, *pieces)), headers

    def metadata(self, versions: Iterable[int | str]) -> dict[str, Any]:
        """Return the model's metadata: which versions are here, inputs and outputs."""
        inputs = [
            {"name": name, "datatype": tensors.DATATYPE_OF[field.dtype], "shape": [-1]}
            for name, field in self._schema.inputs.items()
        ]
        outputs = [{"name": n, "datatype": kind, "shape": [-1]} for n, kind in OUTPUTS.items()]
        return {
            "name": self._model,
            "versions": [str(version) for version in versions],
            "platform": PLATFORM,
            "inputs": inputs,
            "outputs": outputs,
        }

    def _decoded(self, header: bytes) -> _Body:
        try:
            return self._decoder.decode(header)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            _, flaw = decode(header)
            why = flaw or RequestError(f"the body is no inference request: {error}", status=400)
            raise why from error

    def _checked(self, given: Sequence[Tensor]) -> PredictRequest:
        arrays: dict[str, NDArray[Any]] = {}
        for tensor in given:
            if tensor.name in arrays:
                raise refusal("is there twice", tensor.name)
            arrays[tensor.name] = tensors.column_of(tensor)
        return self._schema.parse_arrays(arrays)


def server_metadata(version: str) -> dict[str, Any]:
    """Return what the protocol wants to know of a server."""
    return {"name": SERVER, "version": version, "extensions": list(EXTENSIONS)}


def _split(body: bytes, header_length: int | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    if not 0 <= header_length <= len(body):
        text = f"the body has {len(body)} bytes; its JSON cannot have {header_length}"
        raise RequestError(text, status=400)
    return body[:header_length], memoryview(body)[header_length:]


def _from_json(item: _Input) -> list[Tensor]:
    tensor, known = tensors.from_json(item.name, item.datatype, item.shape, item.data)
    if known is None:
        return [tensor]
    return [tensor, Tensor(item.name + VALID, "BOOL", tensor.shape, known)]


def _wanted(content: _Body) -> dict[str, bool]:
    default = content.parameters.binary_data_output
    wanted: dict[str, bool] = {}
    for output in content.outputs:
        _refuse_extensions(output.parameters, output.name)
        binary = output.parameters.binary_data
        wanted[_output(output.name)] = default if binary is None else binary
    return wanted or dict.fromkeys(_DEFAULT_OUTPUTS, default)


def _output(name: str) -> str:
    if name not in OUTPUTS:
        refuse_unknown(name, OUTPUTS, "output")
    return name


def _refuse_extensions(parameters: _Parameters, name: str) -> None:
    if parameters.shared_memory_region is not None:
        raise refusal("is in shared memory, which is not supported", name)
    if parameters.classification not in (None, 0):
        raise refusal("cannot be asked for as a classification", name)


def _tensor(name: str, answer: Answer) -> Tensor:
    values: NDArray[Any]
    if name == "score":
        values = answer.scores
    elif name == "label":
        values = np.array(answer.labels, np.int64)
    elif name == ID:
        values = np.array(answer.ids, dtype=object)
    else:
        values = answer.row_versions()
    return Tensor(name, OUTPUTS[name], (len(answer.ids),), values)
