"""Raw tensors in the safetensors format: one for each input, for large batches of numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mlops_ray.errors import RequestError
from mlops_ray.serving.formats.refusal import refusal

SAFETENSORS = b"application/vnd.safetensors"

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_LENGTH_BYTES = 8
_WIDEST_TEXT = 2**31 - 1

Size = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[list[Size], msgspec.Meta(min_length=1, max_length=2)]
    data_offsets: tuple[Size, Size]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)


def read_tensors(body: bytes, texts: Collection[str]) -> dict[str, NDArray[Any]]:
    """Return a flat array for each tensor of shape [n] or [n, 1].

    Tensors that are named in ``texts`` are U8 of shape [n, width] and hold UTF-8, filled up with
    zeros; they come out as objects of ``bytes``.

    Raises:
        RequestError: 400 where it is no safetensors body, 422 where a tensor cannot be a column.
    """
    entries, data = _split(body)
    _check_offsets(entries, len(data))
    return {
        name: _text(name, entry, data) if name in texts else _numbers(name, entry, data)
        for name, entry in entries.items()
    }


def _split(body: bytes) -> tuple[dict[str, _Entry], memoryview]:
    start = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
    if len(body) < _LENGTH_BYTES or start > len(body):
        raise _broken("its header is cut off")
    try:
        header = _HEADER.decode(body[_LENGTH_BYTES:start])
        entries = {n: _ENTRY.decode(raw) for n, raw in header.items() if n != "__metadata__"}
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _broken(f"its header is wrong: {error}") from error
    return entries, memoryview(body)[start:]


def _check_offsets(entries: Mapping[str, _Entry], size: int) -> None:
    """Raise unless the tensors lie one behind the other and fill the body."""
    place = 0
    for begin, end in sorted(entry.data_offsets for entry in entries.values()):
        if begin != place or end < begin:
            raise _broken("its tensors overlap, or leave holes")
        place = end
    if place != size:
        raise _broken(f"its tensors have {place} bytes together, and {size} came")


def _numbers(name: str, entry: _Entry, data: memoryview) -> NDArray[Any]:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise refusal(f"has the type {entry.dtype[:20]!r}; use one of {', '.join(_DTYPES)}", name)
    if entry.shape[1:] not in ([], [1]):
        raise refusal(f"must have the shape [n] or [n, 1], not {entry.shape}", name)
    found = np.frombuffer(_bytes_of(name, entry, data, dtype.itemsize), _plain(dtype))
    return found != 0 if dtype.kind == "b" else found


def _text(name: str, entry: _Entry, data: memoryview) -> NDArray[Any]:
    if entry.dtype != "U8" or len(entry.shape) != 2:
        text = "must be a U8 tensor of shape [n, width] with UTF-8, filled up with zeros"
        raise refusal(text, name)
    width = entry.shape[1]
    found = _bytes_of(name, entry, data, 1)
    if not 1 <= width <= _WIDEST_TEXT:
        raise refusal(f"must have a width of 1 to {_WIDEST_TEXT}", name)
    return np.frombuffer(found, f"S{width}").astype(object)


def _bytes_of(name: str, entry: _Entry, data: memoryview, item_bytes: int) -> memoryview:
    begin, end = entry.data_offsets
    if end - begin != math.prod(entry.shape) * item_bytes:
        raise refusal(
            f"has {end - begin} bytes, which is not what its shape {entry.shape} needs", name
        )
    return data[begin:end]


def _plain(dtype: np.dtype[Any]) -> np.dtype[Any]:
    # Any byte but 0 and 1 is no boolean to numpy.
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype


def _broken(why: str) -> RequestError:
    return RequestError(f"the body is no safetensors: {why}", status=400)
