"""JSON bodies of predictions: read and checked at once where sound, explained where not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any

import msgspec

from mlops_ray.config.features import RequestField
from mlops_ray.errors import RequestError
from mlops_ray.serving.formats.fields import INT64_MAX, INT64_MIN, FieldCheck
from mlops_ray.serving.formats.refusal import refusal, refuse_unknown, shorten

MAX_ID_LENGTH = 256

_KEYS = ("rows", "columns", "ids")
_UNREADABLE = (msgspec.MsgspecError, UnicodeError, RecursionError)


Content = tuple[Sequence[Sequence[Any]], int, list[str] | None]
"""What a sound body holds: for each input its JSON values; how many rows; the prediction ids."""


class JsonBody:
    """Reads bodies such as ``{"rows": [{…}], "ids": ["a"]}`` or ``{"columns": {name: […]}}``.

    A decoder that was made for the inputs reads a sound body and checks it in one pass; where it
    refuses, the body is read again with checks that can say why. Those have the last word.
    """

    def __init__(self, inputs: Mapping[str, RequestField], max_rows: int) -> None:
        self._checks = {name: FieldCheck(name, field) for name, field in inputs.items()}
        self._max_rows = max_rows
        self._decoder = _decoder(inputs, max_rows)
        getter = attrgetter(*(f"f{index}" for index in range(len(inputs))))
        self._values = getter if len(inputs) > 1 else lambda row: (getter(row),)

    def read(self, body: bytes) -> Content:
        """Return the content of a sound body.

        Raises:
            RequestError: 400 no JSON, 413 too many rows, 422 anything else; nothing else is raised.
        """
        content = self._read_quickly(body)
        return self.read_carefully(body) if content is None else content

    def _read_quickly(self, body: bytes) -> Content | None:
        try:
            found = self._decoder.decode(body)
        except _UNREADABLE:
            return None
        rows, columns, ids = found.rows, found.columns, found.ids
        if (rows is None) == (columns is None):
            return None
        if columns is None:
            count = len(rows)
            values: Sequence[Any] = tuple(zip(*map(self._values, rows), strict=False))
        else:
            values = self._values(columns)
            count = len(values[0])
            if any(len(column) != count for column in values):
                return None
        if ids is not None and (len(ids) != count or len(set(ids)) != count):
            return None
        return values, count, ids

    def read_carefully(self, body: bytes) -> Content:
        """Do the same as ``read``, several times slower."""
        content, flaw = decode(body)
        if not isinstance(content, dict):
            raise RequestError('the body must be an object like {"rows": [{…}]}')
        for key in content:
            if key not in _KEYS:
                refuse_unknown(key, _KEYS, "key")
        by_rows, by_columns = content.get("rows"), content.get("columns")
        if (by_rows is None) == (by_columns is None):
            raise RequestError("give either rows or columns, not both or neither", field="rows")
        if by_columns is None:
            values, count = self._from_rows(by_rows)
        else:
            values, count = self._from_columns(by_columns)
        for column, check in zip(values, self._checks.values(), strict=True):
            check.check(column)
        ids = content.get("ids")
        checked = None if ids is None else check_ids(ids, count)
        if flaw is not None:
            raise flaw
        return values, count, checked

    def _from_rows(self, rows: Any) -> tuple[list[list[Any]], int]:
        self._check_count(rows, "rows")
        for index, row in enumerate(rows):
            if type(row) is not dict:
                raise refusal("must hold an object for each row", "rows", index)
            self._check_names(row, index)
        return [[row[name] for row in rows] for name in self._checks], len(rows)

    def _from_columns(self, columns: Any) -> tuple[list[list[Any]], int]:
        if type(columns) is not dict:
            raise refusal("must be an object of lists", "columns")
        self._check_names(columns, None)
        first = next(iter(self._checks))
        for name in self._checks:
            if type(columns[name]) is not list:
                raise refusal("must be a list of values", name)
            if len(columns[name]) != len(columns[first]):
                text = f"has {len(columns[name])} values where {first} has {len(columns[first])}"
                raise refusal(text, name)
        self._check_count(columns[first], first)
        return [columns[name] for name in self._checks], len(columns[first])

    def _check_count(self, values: Any, name: str) -> None:
        if type(values) is not list:
            raise refusal("must be a list", name)
        check_row_count(len(values), self._max_rows, name)

    def _check_names(self, row: dict[str, Any], index: int | None) -> None:
        # An unknown name goes first: where a name has a typo, it explains the missing one.
        for name in row:
            if name not in self._checks:
                refuse_unknown(name, self._checks, "field", index)
        for name in self._checks:
            if name not in row:
                raise refusal("is missing", name, index)


def check_row_count(count: int, max_rows: int, name: str) -> None:
    """Raise a RequestError, 422 where there are no rows and 413 where there are too many."""
    if not count:
        raise refusal("holds no rows", name)
    if count > max_rows:
        text = f"holds {count} rows; a request may have {max_rows}"
        raise refusal(text, name, status=413)


def check_ids(ids: Any, count: int) -> list[str]:
    """Return the prediction ids if they are ``count`` different ones; RequestError 422 otherwise."""
    if type(ids) is not list:
        raise refusal("must be a list of strings", "ids")
    if len(ids) != count:
        raise refusal(f"holds {len(ids)} ids for {count} rows", "ids")
    seen: set[str] = set()
    for row, value in enumerate(ids):
        if check_id(value, "ids", row) in seen:
            raise refusal(f"holds {shorten(value)} twice", "ids", row)
        seen.add(value)
    return ids


def check_id(value: Any, name: str, row: int) -> str:
    """Return a prediction id if it can be one; RequestError 422 otherwise."""
    if type(value) is not str or not value or len(value) > MAX_ID_LENGTH:
        raise refusal(f"must be a string of 1 to {MAX_ID_LENGTH} characters", name, row)
    return value


def decode(body: bytes) -> tuple[Any, RequestError | None]:
    """Return the JSON content, and the error to raise if nothing better is found in it.

    NaN and Infinity are no JSON; Python's decoder lets them through, so that the checks behind can
    name the field that holds them.
    """
    try:
        return msgspec.json.decode(body), None
    except _UNREADABLE as error:
        flaw = RequestError(f"the body is not JSON: {error}", status=400)
    try:
        return json.loads(body), flaw
    except (ValueError, RecursionError):
        raise flaw from None


def _decoder(inputs: Mapping[str, RequestField], max_rows: int) -> msgspec.json.Decoder[Any]:
    """Return a decoder of bodies. Field n is called ``fn``, as names of inputs can be any text."""
    kinds = {name: _kind(field) for name, field in inputs.items()}
    names = {f"f{index}": name for index, name in enumerate(inputs)}
    some = msgspec.Meta(min_length=1, max_length=max_rows)
    strict: dict[str, Any] = {"forbid_unknown_fields": True, "gc": False}
    row = msgspec.defstruct(
        "Row", list(zip(names, kinds.values(), strict=True)), rename=names, **strict
    )
    columns = msgspec.defstruct(
        "Columns",
        [(f, Annotated[list[kind], some]) for f, kind in zip(names, kinds.values(), strict=True)],  # type: ignore[valid-type]
        rename=names,
        **strict,
    )
    one_id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_LENGTH)]
    body = msgspec.defstruct(
        "Body",
        [
            ("rows", Annotated[list[row], some] | None, None),  # type: ignore[valid-type]
            ("columns", columns | None, None),
            ("ids", list[one_id] | None, None),
        ],
        **strict,
    )
    return msgspec.json.Decoder(body)


def _kind(field: RequestField) -> Any:
    kind = {"string": str, "bool": bool, "timestamp": str}.get(field.dtype) or _number(field)
    return kind | None if field.nullable else kind


def _number(field: RequestField) -> Any:
    low, high = _finite(field.minimum), _finite(field.maximum)
    if field.dtype == "float":
        return Annotated[float, msgspec.Meta(ge=low, le=high)]
    least = INT64_MIN if low is None else min(max(INT64_MIN, math.ceil(low)), INT64_MAX)
    most = INT64_MAX if high is None else max(min(INT64_MAX, math.floor(high)), INT64_MIN)
    return Annotated[int, msgspec.Meta(ge=least, le=most)]


def _finite(bound: float | None) -> float | None:
    return bound if bound is not None and math.isfinite(bound) else None
