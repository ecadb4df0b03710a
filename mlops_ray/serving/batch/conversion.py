"""Texts to the types that a service declares, a column at a time; what fails is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.features.columns import INSTANT

Flaws = dict[int, str]
"""What is wrong with values, by their place in a column."""

_SHOWN_CHARACTERS = 60
_NAIVE = pa.timestamp("us")


def from_texts(
    values: pa.Array | pa.ChunkedArray, kind: pa.DataType, *, empty_is_null: bool
) -> tuple[pa.Array, Flaws]:
    """Return texts, as strings or UTF-8 bytes, as values of a type; null where one has a flaw."""
    texts, flaws = _decoded(_whole(values))
    if empty_is_null:
        texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    if kind == pa.string():
        return texts, flaws
    try:
        return _cast(texts, kind), flaws
    except pa.ArrowInvalid:
        return _one_by_one(texts.to_pylist(), kind, _parse, flaws)


def from_objects(values: Sequence[Any], kind: pa.DataType) -> tuple[pa.Array, Flaws]:
    """Return what JSON's values are as a type; null where one has a flaw."""
    # Arrow itself would take true for 1 and 1.5 for 1.
    fitting = {str} if kind == INSTANT else set(_FITTING.get(kind, ()))
    if not fitting or set(map(type, values)) <= fitting | {type(None)}:
        try:
            if kind == INSTANT:
                return _cast(pa.array(values, pa.string()), kind), {}
            return pa.array(values, kind), {}
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            pass
    return _one_by_one(values, kind, _accept, {})


def as_text(value: Any) -> str:
    """Return a value as JSON; what JSON has no word for as its own text."""
    return orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()


def _plain(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _whole(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _decoded(values: pa.Array) -> tuple[pa.Array, Flaws]:
    try:
        return values.cast(pa.string()), {}
    except pa.ArrowInvalid:
        return _one_by_one(values.to_pylist(), pa.string(), _decode, {})


def _decode(value: bytes, kind: pa.DataType) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ValueError("must be UTF-8") from None


def _cast(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    if kind != INSTANT:
        return texts.cast(kind)
    try:
        return texts.cast(INSTANT)
    except pa.ArrowInvalid:
        # Arrow wants an offset in every text or in none; one without is UTC.
        return texts.cast(_NAIVE).cast(INSTANT)


def _one_by_one(
    values: Sequence[Any],
    kind: pa.DataType,
    convert: Callable[[Any, pa.DataType], Any],
    flaws: Flaws,
) -> tuple[pa.Array, Flaws]:
    found: list[Any] = [None] * len(values)
    for place, value in enumerate(values):
        if value is None or place in flaws:
            continue
        try:
            found[place] = convert(value, kind)
        except ValueError as error:
            flaws[place] = str(error)
    return pa.array(found, kind), flaws


def _parse(text: str, kind: pa.DataType) -> Any:
    try:
        if kind == INSTANT:
            return _instant(text)
        return pa.scalar(text).cast(kind).as_py()
    except (ValueError, OverflowError):
        raise ValueError(f"must be {_NAMES[kind]}, not {_shown(text)}") from None


def _accept(value: Any, kind: pa.DataType) -> Any:
    if kind == INSTANT and type(value) is str:
        return _parse(value, kind)
    if kind not in _FITTING:
        return _other(value, kind)
    if type(value) in _FITTING[kind] and (kind != pa.int64() or -(2**63) <= value < 2**63):
        return value
    raise ValueError(f"must be {_NAMES[kind]}, not {_shown(value)}")


def _other(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        raise ValueError(f"must be {kind} as in the first rows, not {_shown(value)}") from None


def _instant(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


_NAMES = {
    pa.string(): "a string",
    pa.int64(): "a whole number",
    pa.float64(): "a number",
    pa.bool_(): "true or false",
    INSTANT: "an ISO 8601 time like 2013-03-01T13:15:00Z",
}
_FITTING: dict[pa.DataType, tuple[type, ...]] = {
    pa.string(): (str,),
    pa.int64(): (int,),
    pa.float64(): (int, float),
    pa.bool_(): (bool,),
    INSTANT: (),
}
