"""Moments: ISO 8601 texts and µs since 1970 UTC."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.serving.formats.refusal import kind_of, refusal, shorten

FIRST_US = -62_135_596_800_000_000
LAST_US = 253_402_300_799_999_999
"""The years 1 to 9999 in UTC: other parts of Python know no other times."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NAT = -(2**63)
_WISH = "must be an ISO 8601 time like 2013-03-01T13:15:00Z, not"
_MANY = 64
_ZONED = pa.timestamp("us", tz="UTC")
_MICROSECONDS = np.dtype("datetime64[us]")


def instant(value: Any, name: str, row: int) -> int:
    """Return the µs since 1970 UTC of an ISO 8601 text; one without an offset is UTC.

    Raises:
        RequestError: 422 where it is no such text; it names ``name`` and ``row``.
    """
    if type(value) is not str:
        raise refusal(f"{_WISH} {kind_of(value)}", name, row)
    try:
        found_us = micros(datetime.fromisoformat(value))
    except ValueError:
        raise refusal(f"{_WISH} {shorten(value)}", name, row) from None
    if not FIRST_US <= found_us <= LAST_US:
        # An offset can lead beyond the years that the text itself may name.
        raise refusal("must lie in the years 1 to 9999 in UTC", name, row)
    return found_us


def micros(moment: datetime) -> int:
    """Return the µs since 1970 UTC; a moment without a zone is UTC."""
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def instants(values: Sequence[str | None], name: str) -> NDArray[np.datetime64]:
    """Return ``datetime64[us]`` of ISO 8601 texts, NaT of None; errors as of ``instant``."""
    if len(values) > 1 and values.count(values[0]) == len(values):
        # The rows of a request mostly tell one time.
        return np.repeat(instants(values[:1], name), len(values))
    if len(values) >= _MANY and (quick := _by_arrow(values)) is not None:
        return quick
    try:
        found_us = [micros(moment) for moment in map(datetime.fromisoformat, values)]  # type: ignore[arg-type]
        if min(found_us, default=0) >= FIRST_US and max(found_us, default=0) <= LAST_US:
            return np.array(found_us, _MICROSECONDS)
    except (TypeError, ValueError):
        pass
    found = ["NaT" if v is None else instant(v, name, row) for row, v in enumerate(values)]
    return np.array(found, _MICROSECONDS)


def _by_arrow(values: Sequence[str | None]) -> NDArray[np.datetime64] | None:
    """Return the same quicker; None where a text is spelled in a way that Arrow does not know."""
    try:
        times = pa.array(values, pa.string()).cast(_ZONED)
    except (pa.ArrowException, UnicodeError):
        return None
    found = np.array(
        times.cast(pa.int64()).fill_null(_NAT) if times.null_count else times.cast(pa.int64())
    )
    known = found[found != _NAT]
    # Arrow knows years that Python does not.
    if known.size and not FIRST_US <= known.min() <= known.max() <= LAST_US:
        return None
    return found.view(_MICROSECONDS)
