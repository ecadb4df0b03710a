"""The content of a request: checked columns, whatever form they came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from mlops_ray.config.features import RequestField
from mlops_ray.serving.formats.arrays import ArrayCheck, Arrays, Mask, from_table
from mlops_ray.serving.formats.fields import Column
from mlops_ray.serving.formats.instants import instants
from mlops_ray.serving.formats.json_body import JsonBody, check_ids, check_row_count
from mlops_ray.serving.formats.refusal import refusal, refuse_unknown
from mlops_ray.serving.formats.safetensors_body import read_tensors

ID = "id"
"""The column or tensor that holds prediction ids, unless an input has that name."""
VALID = ".valid"
"""What a tensor is called that says which values of an input are not null."""

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "string": np.dtype(object),
    "int": np.dtype(np.int64),
    "float": np.dtype(np.float64),
    "bool": np.dtype(np.bool_),
}


@dataclass(slots=True)
class PredictRequest:
    """The checked content of a prediction request: one array of length ``rows`` for each input."""

    columns: dict[str, Column]
    rows: int
    ids: list[str] | None


class RequestSchema:
    """Checks prediction requests against the inputs of a feature service.

    Columns come out as: string → object array of ``str``; int → int64; float → float64; bool →
    bool; timestamp → ``datetime64[us]`` in UTC. A null in a nullable field is ``None`` in a string,
    int or bool column (which is then an object array), NaN in a float one, NaT in a timestamp.
    """

    def __init__(self, inputs: Mapping[str, RequestField], max_rows: int) -> None:
        self.inputs = dict(inputs)
        self.max_rows = max_rows
        self._json = JsonBody(inputs, max_rows)
        self._arrays = {name: ArrayCheck(name, field) for name, field in inputs.items()}
        self._ids = ArrayCheck(ID, RequestField(dtype="string"))
        self._texts = {name for name, field in inputs.items() if field.dtype == "string"}
        if ID not in inputs:
            self._texts.add(ID)
        self._columns = [(name, _maker(name, field)) for name, field in inputs.items()]

    def parse(self, body: bytes) -> PredictRequest:
        """Return the columns of a body such as ``{"rows": [{…}], "ids": ["a"]}``.

        ``{"columns": {name: […]}}`` says the same column by column.

        Raises:
            RequestError: 400 no JSON, 413 too many rows, 422 anything else; nothing else is raised.
        """
        values, rows, ids = self._json.read(body)
        columns = {
            name: make(column) for (name, make), column in zip(self._columns, values, strict=False)
        }
        return PredictRequest(columns, rows, ids)

    def parse_table(self, table: pa.Table) -> PredictRequest:
        """Return the columns of an Arrow table; its column ``id``, if there is one, holds the ids.

        Nulls are Arrow's own.

        Raises:
            RequestError: 413 too many rows, 422 anything else.
        """
        self._check_names(table.column_names)
        check_row_count(table.num_rows, self.max_rows, "the table")
        return self._request(*from_table(table))

    def parse_tensors(self, body: bytes) -> PredictRequest:
        """Return the columns of a safetensors body: a tensor for each input, ``[n]`` or ``[n, 1]``.

        Texts are U8 tensors ``[n, width]``; see ``parse_arrays`` for the rest.

        Raises:
            RequestError: 400 no safetensors, 413 too many rows, 422 anything else.
        """
        return self.parse_arrays(read_tensors(body, self._texts))

    def parse_arrays(self, arrays: Arrays) -> PredictRequest:
        """Return the columns of arrays by name, all of one length.

        Texts are object arrays of ``str`` or UTF-8 ``bytes``; times are ``datetime64``, int64 in µs
        since 1970 UTC, or ISO 8601 texts. Booleans called ``<input>.valid`` say which values of an
        input are not null; NaN and NaT are null too. ``id`` holds the prediction ids.

        Raises:
            RequestError: 413 too many rows, 422 anything else.
        """
        given = dict(arrays)
        names = {*self._arrays, ID} if ID in given else {*self._arrays}
        masks = {n: n + VALID for n in names if n + VALID not in self._arrays}
        valid = {n: given.pop(mask) for n, mask in masks.items() if mask in given}
        self._check_names([*given])
        self._count(arrays)
        return self._request(given, valid)

    def _request(self, given: Arrays, valid: Mapping[str, Mask]) -> PredictRequest:
        """Return the request of arrays of one length, whose names are right."""
        columns = {
            name: check.column(given[name], valid.get(name)) for name, check in self._arrays.items()
        }
        rows = len(next(iter(columns.values())))
        if ID in self._arrays or ID not in given:
            return PredictRequest(columns, rows, None)
        texts = self._ids.column(given[ID], valid.get(ID)).tolist()
        return PredictRequest(columns, rows, check_ids(texts, rows))

    def _check_names(self, names: Sequence[str]) -> None:
        found: set[str] = set()
        for name in names:
            if name not in self._arrays and name != ID:
                refuse_unknown(name, self._arrays)
            if name in found:
                raise refusal("is there twice", name)
            found.add(name)
        for name in self._arrays:
            if name not in found:
                raise refusal("is missing", name)

    def _count(self, arrays: Arrays) -> None:
        first = next(iter(self._arrays))
        rows = len(arrays[first])
        for name, array in arrays.items():
            if len(array) != rows:
                raise refusal(f"has {len(array)} values where {first} has {rows}", name)
        check_row_count(rows, self.max_rows, first)


def _maker(name: str, field: RequestField) -> Callable[[Sequence[Any]], Column]:
    """Return what makes a column of checked JSON values."""
    if field.dtype == "timestamp":
        return partial(instants, name=name)
    if field.dtype in ("int", "bool") and field.nullable:
        return partial(_with_nones, dtype=_DTYPES[field.dtype])
    return partial(np.array, dtype=_DTYPES[field.dtype])  # None becomes NaN in floats


def _with_nones(values: Sequence[Any], dtype: np.dtype[Any]) -> Column:
    return np.array(values, _DTYPES["string"] if None in values else dtype)
