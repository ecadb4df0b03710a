"""The body of a request: bytes in, checked columns out, or one error that names field and row."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import numpy as np
import orjson
from numpy.typing import NDArray

from mlops_ray.config.features import RequestField
from mlops_ray.errors import RequestError

MAX_ID_LENGTH = 256

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_LARGEST_INT = 2**1023
_BODY = {"rows", "columns", "ids"}

Column = NDArray[Any]


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """The checked content of a prediction request: one array of length ``rows`` for each input."""

    columns: dict[str, Column]
    rows: int
    ids: list[str] | None


@dataclass(frozen=True, slots=True)
class Feedback:
    """Labels (0 or 1) by prediction id; ``known_at_us`` is in µs since 1970 UTC."""

    ids: list[str]
    labels: list[int]
    known_at_us: list[int]


class RequestSchema:
    """Checks prediction requests against the inputs of a feature service.

    Columns come out as: string → object array of ``str``; int → int64; float → float64; bool →
    bool; timestamp → ``datetime64[us]`` in UTC. A null in a nullable field is ``None`` in a string,
    int or bool column (which is then an object array), NaN in a float one, NaT in a timestamp.
    """

    def __init__(self, inputs: Mapping[str, RequestField], max_rows: int) -> None:
        self._fields = {name: _FieldParser(name, field) for name, field in inputs.items()}
        self._max_rows = max_rows

    def parse(self, body: bytes) -> PredictRequest:
        """Return the columns of a body such as ``{"rows": [{…}], "ids": ["a"]}``.

        ``{"columns": {name: […]}}`` says the same column by column.

        Raises:
            RequestError: 400 no JSON, 413 too many rows, 422 anything else; nothing else is raised.
        """
        content, flaw = _decode(body)
        request = self._read(content)
        if flaw is not None:
            raise flaw
        return request

    def _read(self, content: Any) -> PredictRequest:
        if not isinstance(content, dict):
            raise RequestError('the body must be an object like {"rows": [{…}]}')
        for key in content:
            if key not in _BODY:
                _unknown(key, _BODY, "key")
        if ("rows" in content) == ("columns" in content):
            raise RequestError("give either rows or columns, not both or neither", field="rows")
        if "rows" in content:
            values, count = self._from_rows(content["rows"])
        else:
            values, count = self._from_columns(content["columns"])
        columns = {name: parser.parse(values[name]) for name, parser in self._fields.items()}
        ids = content.get("ids")
        return PredictRequest(columns, count, None if ids is None else _ids(ids, count))

    def _from_rows(self, rows: Any) -> tuple[dict[str, list[Any]], int]:
        self._check_count(rows, "rows")
        width = len(self._fields)
        for index, row in enumerate(rows):
            if type(row) is not dict:
                raise _refusal("must hold an object for each row", "rows", index)
            if len(row) != width or not all(name in row for name in self._fields):
                self._bad_names(row, index)
        return {name: [row[name] for row in rows] for name in self._fields}, len(rows)

    def _from_columns(self, columns: Any) -> tuple[dict[str, list[Any]], int]:
        if type(columns) is not dict:
            raise _refusal("must be an object of lists", "columns")
        self._bad_names(columns, None)
        first = next(iter(self._fields))
        for name in self._fields:
            if type(columns[name]) is not list:
                raise _refusal("must be a list of values", name)
            if len(columns[name]) != len(columns[first]):
                raise _refusal(
                    f"has {len(columns[name])} values where {first} has {len(columns[first])}", name
                )
        self._check_count(columns[first], first)
        return columns, len(columns[first])

    def _check_count(self, values: Any, name: str) -> None:
        if type(values) is not list:
            raise _refusal("must be a list", name)
        if not values:
            raise _refusal("holds no rows", name)
        if len(values) > self._max_rows:
            raise _refusal(
                f"holds {len(values)} rows; a request may have {self._max_rows}", name, status=413
            )

    def _bad_names(self, row: dict[str, Any], index: int | None) -> None:
        # An unknown name goes first: where a name has a typo, it explains the missing one.
        for name in row:
            if name not in self._fields:
                _unknown(name, set(self._fields), "field", index)
        for name in self._fields:
            if name not in row:
                raise _refusal("is missing", name, index)


def parse_feedback(body: bytes, max_rows: int, now: datetime) -> Feedback:
    """Return the labels of a body like ``{"labels": [{"id": "a", "label": 1, "known_at": "…"}]}``.

    ``known_at`` may be left out: the label is then known ``now``.

    Raises:
        RequestError: as for ``RequestSchema.parse``.
    """
    content, flaw = _decode(body)
    if not isinstance(content, dict) or set(content) != {"labels"}:
        raise RequestError('the body must be {"labels": [{"id": …, "label": …}]}', field="labels")
    rows = content["labels"]
    if type(rows) is not list or not rows:
        raise _refusal("must be a list of at least one label", "labels")
    if len(rows) > max_rows:
        raise _refusal(
            f"holds {len(rows)} labels; a request may have {max_rows}", "labels", status=413
        )
    feedback = Feedback([], [], [])
    for index, row in enumerate(rows):
        if type(row) is not dict:
            raise _refusal("must hold an object for each label", "labels", index)
        for name in row:
            if name not in ("id", "label", "known_at"):
                _unknown(name, {"id", "label", "known_at"}, "field", index)
        feedback.ids.append(_check_id(row.get("id"), "id", index))
        feedback.labels.append(_label(row.get("label"), index))
        known_at = row.get("known_at")
        moment = _instant(known_at, "known_at", index) if known_at is not None else _micros(now)
        feedback.known_at_us.append(moment)
    if flaw is not None:
        raise flaw
    return feedback


class _FieldParser:
    """Turns the JSON values of one field into an array."""

    def __init__(self, name: str, field: RequestField) -> None:
        self._name = name
        self._dtype = field.dtype
        self._nullable = field.nullable
        self._minimum = -math.inf if field.minimum is None else field.minimum
        self._maximum = math.inf if field.maximum is None else field.maximum
        self._bounded = field.minimum is not None or field.maximum is not None
        self._array: Callable[[list[Any]], Column] = getattr(self, f"_{field.dtype}")

    def parse(self, values: list[Any]) -> Column:
        if None in values and not self._nullable:
            raise _refusal("must not be null", self._name, values.index(None))
        return self._array(values)

    def _string(self, values: list[Any]) -> Column:
        for row, value in enumerate(values):
            if type(value) is not str and value is not None:
                self._wrong("a string", value, row)
        return _objects(values)

    def _bool(self, values: list[Any]) -> Column:
        for row, value in enumerate(values):
            if type(value) is not bool and value is not None:
                self._wrong("true or false", value, row)
        return _objects(values) if None in values else np.array(values, dtype=np.bool_)

    def _int(self, values: list[Any]) -> Column:
        for row, value in enumerate(values):
            if value is None:
                continue
            if type(value) is not int:
                self._wrong("a whole number", value, row)
            if not _INT64_MIN <= value <= _INT64_MAX:
                raise _refusal("does not fit 64 bits", self._name, row)
            self._check_bounds(value, row)
        return _objects(values) if None in values else np.array(values, dtype=np.int64)

    def _float(self, values: list[Any]) -> Column:
        for row, value in enumerate(values):
            if value is None:
                continue
            kind = type(value)
            if kind is not float and kind is not int:
                self._wrong("a number", value, row)
            if kind is float and not math.isfinite(value):
                raise _refusal("must be finite: NaN and Infinity are refused", self._name, row)
            if kind is int and abs(value) > _LARGEST_INT:
                raise _refusal("is too large", self._name, row)
            self._check_bounds(value, row)
        return np.array(values, dtype=np.float64)  # None becomes NaN

    def _timestamp(self, values: list[Any]) -> Column:
        micros = [
            None if value is None else _instant(value, self._name, row)
            for row, value in enumerate(values)
        ]
        if None in micros:
            return np.array(["NaT" if m is None else m for m in micros], dtype="datetime64[us]")
        return np.array(micros, dtype=np.int64).view("datetime64[us]")

    def _check_bounds(self, value: float, row: int) -> None:
        if self._bounded and not self._minimum <= value <= self._maximum:
            low, high = f"be at least {self._minimum:g}", f"be at most {self._maximum:g}"
            raise _refusal(f"must {low if value < self._minimum else high}", self._name, row)

    def _wrong(self, wanted: str, value: Any, row: int) -> NoReturn:
        raise _refusal(f"must be {wanted}, not {_kind(value)}", self._name, row)


def _decode(body: bytes) -> tuple[Any, RequestError | None]:
    """Return the JSON content, and the error to raise if nothing better is found in it.

    NaN and Infinity are no JSON; Python's decoder lets them through, so that the checks behind can
    name the field that holds them.
    """
    try:
        return orjson.loads(body), None
    except orjson.JSONDecodeError as error:
        flaw = RequestError(f"the body is not JSON: {error}", status=400)
    try:
        return json.loads(body), flaw
    except (ValueError, RecursionError):
        raise flaw from None


def _objects(values: list[Any]) -> Column:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _instant(value: Any, name: str, row: int) -> int:
    """µs since 1970 UTC of an ISO 8601 text; one without an offset is UTC."""
    if type(value) is not str:
        raise _refusal(
            f"must be an ISO 8601 time like 2013-03-01T13:15:00Z, not {_kind(value)}", name, row
        )
    try:
        return _micros(datetime.fromisoformat(value))
    except ValueError:
        raise _refusal(
            f"must be an ISO 8601 time like 2013-03-01T13:15:00Z, not {_shorten(value)}", name, row
        ) from None


def _micros(moment: datetime) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND


def _ids(ids: Any, count: int) -> list[str]:
    if type(ids) is not list:
        raise _refusal("must be a list of strings", "ids")
    if len(ids) != count:
        raise _refusal(f"holds {len(ids)} ids for {count} rows", "ids")
    for row, value in enumerate(ids):
        _check_id(value, "ids", row)
    if len(set(ids)) != count:
        row = next(row for row, value in enumerate(ids) if value in ids[:row])
        raise _refusal(f"holds {_shorten(ids[row])} twice", "ids", row)
    return ids


def _check_id(value: Any, name: str, row: int) -> str:
    if type(value) is not str or not value or len(value) > MAX_ID_LENGTH:
        raise _refusal(f"must be a string of 1 to {MAX_ID_LENGTH} characters", name, row)
    return value


def _label(value: Any, row: int) -> int:
    if type(value) in (int, bool) and value in (0, 1):
        return int(value)
    raise _refusal("must be 0 or 1", "label", row)


def _unknown(name: str, known: set[str], what: str, row: int | None = None) -> NoReturn:
    close = difflib.get_close_matches(name[:80], sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"
    raise RequestError(f"unknown {what} {_shorten(name)}{hint}", field=name[:80], row=row)


def _refusal(text: str, field: str, row: int | None = None, *, status: int = 422) -> RequestError:
    return RequestError(f"{field} {text}", status=status, field=field, row=row)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
