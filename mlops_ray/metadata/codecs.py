"""Codecs: how values become bytes and come back, bit for bit. Equal values have equal bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from mlops_ray.errors import ArtifactError
from mlops_ray.metadata.digest import canonical_json

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["table", "tree", "json", "tensors", "pickle", "list"]

_IN_MEMORY_BYTES = 8 << 20
_ROWS_PER_BATCH = 1 << 17
_FORM = "mlops_ray"
_JSON = (BaseModel, dict, list, tuple, str, int, float, bool, type(None), date, timedelta, Enum)


@dataclass(frozen=True)
class Encoded:
    """A value as bytes, if it is small, or as what writes it to a file."""

    kind: Kind
    data: bytes | None = None
    write: Callable[[Path], None] | None = None
    rows: int | None = None


def encode(value: Any, *, allow_pickle: bool = False) -> Encoded:
    """Encode a table, tensors or a JSON value; anything else by pickle where that is allowed.

    Raises:
        ArtifactError: The value is of no kind that can be stored.
    """
    if _is_table(value):
        return _encode_table(value)
    form = _tensor_form(value)
    if form is not None:
        return _encode_tensors(value, form)
    if isinstance(value, _JSON) or dataclasses.is_dataclass(value):
        try:
            return Encoded("json", canonical_json(value))
        except (TypeError, ValueError) as error:
            if not allow_pickle:
                raise _refused(value, str(error)) from error
    if allow_pickle:
        return Encoded("pickle", pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))
    raise _refused(value)


def decode(kind: Kind, data: bytes) -> Any:
    """Return the value of bytes that have been checked against their digest."""
    if kind == "tensors":
        return _decode_tensors(data)
    return pickle.loads(data) if kind == "pickle" else json.loads(data)


def read_table(path: Path) -> pa.Table:
    """Return a table that lies in an Arrow file, memory-mapped."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def is_collection(value: Any) -> bool:
    """Say whether a value is a list of tables, paths or tensors; its first element decides."""
    if not isinstance(value, list | tuple) or not value or hasattr(value, "_asdict"):
        return False
    first = value[0]
    return isinstance(first, Path) or _is_table(first) or _tensor_form(first) is not None


def _refused(value: Any, why: str = "") -> ArtifactError:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    fix = "return a pyarrow.Table, a Path, tensors, a pydantic model or a JSON value from the step"
    if name.startswith("pandas."):
        fix = "return pyarrow.Table.from_pandas(frame); the next step gets the table"
    elif name.startswith("polars."):
        fix = "return frame.to_arrow(); the next step gets the table"
    else:
        fix += ", or declare `pickle: true` for it"
    return ArtifactError(f"a value of type {name} cannot be stored", why=why, fix=fix)


def _is_table(value: Any) -> bool:
    # Where pyarrow was never imported, nothing can be a table.
    pyarrow = sys.modules.get("pyarrow")
    return pyarrow is not None and isinstance(value, pyarrow.Table)


def _encode_table(table: pa.Table) -> Encoded:
    import pyarrow as pa

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink:
            _write_table(table, sink)

    if table.nbytes > _IN_MEMORY_BYTES:
        return Encoded("table", write=write, rows=table.num_rows)
    sink = pa.BufferOutputStream()
    _write_table(table, sink)
    return Encoded("table", sink.getvalue().to_pybytes(), rows=table.num_rows)


def _write_table(table: pa.Table, sink: Any) -> None:
    import pyarrow as pa

    table = table.unify_dictionaries()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for start in range(0, table.num_rows, _ROWS_PER_BATCH):
            part = table.slice(start, _ROWS_PER_BATCH)
            columns = [_canonical(column) for column in part.columns]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=table.schema))


def _canonical(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array in which every byte is decided by its values.

    In a slice, Arrow writes what lies beside it, up to the next multiple of eight bytes; and what
    lies under a null may be anything.
    """
    import numpy as np
    import pyarrow as pa

    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    width = _bytes_per_value(array.type)
    if width and not array.null_count:
        values = array.buffers()[1].slice(array.offset * width, len(array) * width)
        return pa.Array.from_buffers(array.type, len(array), [None, values])
    try:
        return array.take(pa.array(np.arange(len(array))))
    except pa.ArrowNotImplementedError:
        return array


def _bytes_per_value(arrow: pa.DataType) -> int:
    import pyarrow.types as kinds

    plain = kinds.is_integer(arrow) or kinds.is_floating(arrow) or kinds.is_temporal(arrow)
    return arrow.bit_width // 8 if plain else 0


def _tensor_form(value: Any) -> str | None:
    """Name the library and the shape of tensors, such as ``torch dict``; None for other values."""
    if isinstance(value, Mapping):
        kinds = {_library(item) for item in value.values()}
        named = all(isinstance(name, str) for name in value)
        library = kinds.pop() if named and len(kinds) == 1 else None
        return library and f"{library} dict"
    library = _library(value)
    return library and f"{library} one"


def _library(value: Any) -> str | None:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and hasattr(torch, "Tensor") and isinstance(value, torch.Tensor):
        return "torch"
    return "numpy" if numpy is not None and isinstance(value, numpy.ndarray) else None


def _encode_tensors(value: Any, form: str) -> Encoded:
    named = dict(value) if form.endswith("dict") else {"": value}
    # One entry only: safetensors writes several in no fixed order.
    metadata = {_FORM: form}
    if form.startswith("torch"):
        from safetensors import torch as codec

        # Tied weights share memory, which safetensors refuses.
        plain = {name: item.detach().cpu().contiguous().clone() for name, item in named.items()}
    else:
        from safetensors import numpy as codec  # type: ignore[no-redef]

        plain = {name: _plain_array(name, item) for name, item in named.items()}

    def write(path: Path) -> None:
        codec.save_file(plain, path, metadata)

    try:
        if sum(item.nbytes for item in plain.values()) > _IN_MEMORY_BYTES:
            return Encoded("tensors", write=write)
        return Encoded("tensors", codec.save(plain, metadata))
    except (KeyError, ValueError, TypeError) as error:
        raise _refused(value, f"safetensors has no form for it: {error}") from error


def _plain_array(name: str, array: Any) -> Any:
    import numpy as np

    little = array.dtype.newbyteorder("<")
    if array.dtype.kind not in "biufc":
        raise ArtifactError(
            f"an array of {array.dtype} cannot be stored",
            where=name,
            fix="return numbers or booleans; text belongs in a pyarrow.Table",
        )
    # ascontiguousarray makes an array of one dimension from one of none.
    return np.ascontiguousarray(array, dtype=little).reshape(array.shape)


def _decode_tensors(data: bytes) -> Any:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    form = header["__metadata__"][_FORM]
    if form.startswith("torch"):
        from safetensors import torch as codec
    else:
        from safetensors import numpy as codec  # type: ignore[no-redef]
    found = codec.load(data)
    return found if form.endswith("dict") else found[""]


def copy_file(source: Path, target: Path, digest: Any) -> None:
    """Copy a file's bytes durably, and feed them to ``digest``."""
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        buffer = memoryview(bytearray(1 << 20))
        while count := reader.readinto(buffer):
            digest.update(buffer[:count])
            written = 0
            while written < count:
                written += writer.write(buffer[written:count])
        os.fsync(writer.fileno())
