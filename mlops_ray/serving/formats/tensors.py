"""Tensors of the Open Inference Protocol: their datatypes, and their bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.features import DType
from mlops_ray.serving.formats.refusal import kind_of, refusal, refuse_unknown

BYTES = "BYTES"
DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    BYTES: np.dtype(object),
}
DATATYPE_OF: Mapping[DType, str] = {
    "string": BYTES,
    "int": "INT64",
    "float": "FP64",
    "bool": "BOOL",
    "timestamp": "INT64",
}
"""What a model says that its inputs are; other datatypes that mean the same are taken too."""

_LENGTH = struct.Struct("<I")
_MAX_DIMENSIONS = 8
_KINDS: Mapping[str, set[type]] = {
    "b": {bool},
    "i": {int},
    "u": {int},
    "f": {int, float},
    "O": {str},
}
"""What JSON values of a datatype may be, by numpy's kind."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor. ``values`` is flat or has ``shape``; BYTES are objects: ``bytes`` or ``str``."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: NDArray[Any]


def from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Tensor:
    """Return the tensor that ``data`` holds: little endian, row by row; each of BYTES has its length
    in four bytes before it, and stays ``bytes``.

    Raises:
        RequestError: 422 where shape and size do not agree, or the datatype is unknown.
    """
    dtype = dtype_of(name, datatype)
    count = count_of(name, shape)
    if datatype == BYTES:
        return Tensor(name, datatype, tuple(shape), _texts_of(name, count, data))
    if len(data) != count * dtype.itemsize:
        text = f"has {len(data)} bytes where its shape needs {count * dtype.itemsize}"
        raise refusal(text, name)
    if datatype == "BOOL":
        return Tensor(name, datatype, tuple(shape), np.frombuffer(data, np.uint8) != 0)
    return Tensor(name, datatype, tuple(shape), np.frombuffer(data, dtype))


def to_raw(tensor: Tensor) -> bytes:
    """Return the tensor's bytes, as ``from_raw`` reads them."""
    if tensor.datatype != BYTES:
        return tensor.values.astype(DATATYPES[tensor.datatype], copy=False).tobytes()
    pieces: list[bytes] = []
    for value in tensor.values.ravel().tolist():
        text = value.encode() if type(value) is str else value
        pieces += (_LENGTH.pack(len(text)), text)
    return b"".join(pieces)


def from_json(
    name: str, datatype: str, shape: Sequence[int], data: Any
) -> tuple[Tensor, NDArray[np.bool_] | None]:
    """Return the tensor that JSON values hold, flat or nested, and which of them are not null.

    Raises:
        RequestError: 422 where values do not fit the datatype, or their number the shape.
    """
    dtype = dtype_of(name, datatype)
    count = count_of(name, shape)
    values = _flat(name, data, len(shape))
    if len(values) != count:
        raise refusal(f"has {len(values)} values where its shape needs {count}", name)
    known = None
    if None in values:
        known = np.array([value is not None for value in values], np.bool_)
        fill = "" if datatype == BYTES else 0
        values = [fill if value is None else value for value in values]
    if not set(map(type, values)) <= _KINDS[dtype.kind]:
        row = next(row for row, v in enumerate(values) if type(v) not in _KINDS[dtype.kind])
        raise refusal(f"must hold values of {datatype}, not {kind_of(values[row])}", name, row)
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype)
    except OverflowError:
        raise refusal(f"has a value that does not fit {datatype}", name) from None
    return Tensor(name, datatype, tuple(shape), array), known


def to_json(tensor: Tensor) -> list[Any]:
    """Return the tensor's values, flat, as JSON can hold them."""
    values: list[Any] = tensor.values.ravel().tolist()
    return values


def column_of(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor as one value a row. RequestError 422 where its shape is not [n] or [n, 1]."""
    if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ((), (1,)):
        raise refusal(f"must have the shape [n] or [n, 1], not {list(tensor.shape)}", tensor.name)
    if tensor.values.size != tensor.shape[0]:
        text = f"has {tensor.values.size} values where its shape needs {tensor.shape[0]}"
        raise refusal(text, tensor.name)
    return tensor.values.reshape(-1)


def dtype_of(name: str, datatype: str) -> np.dtype[Any]:
    """Return numpy's name of a datatype. RequestError 422 where it is unknown."""
    found = DATATYPES.get(datatype)
    if found is None:
        refuse_unknown(datatype, DATATYPES, f"datatype of {name[:80]}:")
    return found


def count_of(name: str, shape: Sequence[int]) -> int:
    """Return how many values a shape has. RequestError 422 where it is none, or has too many sizes."""
    if not 1 <= len(shape) <= _MAX_DIMENSIONS or any(
        type(size) is not int or size < 0 for size in shape
    ):
        raise refusal(f"must have a shape of 1 to {_MAX_DIMENSIONS} sizes", name)
    return math.prod(shape)


def _flat(name: str, data: Any, dimensions: int) -> list[Any]:
    if type(data) is not list:
        raise refusal("must have its data as a list", name)
    for _ in range(dimensions - 1):
        if not data or type(data[0]) is not list:
            return data
        if any(type(piece) is not list for piece in data):
            raise refusal("has data that is nested here and flat there", name)
        data = [value for piece in data for value in piece]
    return data


def _texts_of(name: str, count: int, data: bytes | memoryview) -> NDArray[Any]:
    view = bytes(data)
    if len(view) < count * _LENGTH.size:
        raise refusal(f"has {len(view)} bytes, too few for {count} texts", name)
    values: list[bytes] = []
    place, end = 0, len(view)
    while place < end and len(values) < count:
        if place + _LENGTH.size > end:
            break
        start = place + _LENGTH.size
        place = start + _LENGTH.unpack_from(view, place)[0]
        values.append(view[start:place])
    if place != end or len(values) != count:
        raise refusal(f"does not hold {count} texts, each after its length", name)
    found = np.empty(count, dtype=object)
    found[:] = values
    return found
