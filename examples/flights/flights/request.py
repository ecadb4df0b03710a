"""Features that the request itself brings: the clock, the calendar, the schedule.

The same function runs over a year of history in training and over one request in serving.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Columns = dict[str, NDArray[np.generic]]

NUMERIC = ("minute_of_day", "block_min", "distance_mi", "pad_min")
CATEGORICAL = ("airline", "airport", "destination", "hour", "weekday")

_UTC = pa.timestamp("us", tz="UTC")
_NEW_YORK = pa.timestamp("us", tz="America/New_York")
_TABLE_HOURS = 24 * 365
_MILES_PER_MINUTE = 8.0
_THURSDAY = 3
_HOURS = np.array([str(hour) for hour in range(24)], dtype=object)
_WEEKDAYS = np.array(["mon", "tue", "wed", "thu", "fri", "sat", "sun"], dtype=object)


def request_features(inputs: Columns) -> Columns:
    """Return the request-time features of n flights.

    Args:
        inputs: ``carrier``, ``origin``, ``dest`` (str), ``distance`` (miles), ``sched_dep`` and
            ``sched_arr`` (datetime64[us], UTC), each of shape [n].

    Returns:
        float64 [n]: ``minute_of_day`` (New York time), ``block_min`` (scheduled duration),
        ``distance_mi``, ``pad_min`` (duration beyond flying the distance at 480 mph).
        str [n]: ``airline``, ``airport``, ``destination``, ``hour``, ``weekday``.
    """
    if not len(inputs["sched_dep"]):
        kinds = dict.fromkeys(NUMERIC, float) | dict.fromkeys(CATEGORICAL, object)
        return {name: np.zeros(0, kind) for name, kind in kinds.items()}
    departure = inputs["sched_dep"].astype("datetime64[us]")
    arrival = inputs["sched_arr"].astype("datetime64[us]")
    local = _local(departure)
    day = local.astype("datetime64[D]")
    minute = (local - day).astype("timedelta64[m]").astype(np.int64)
    block = (arrival - departure) / np.timedelta64(60_000_000, "us")
    distance = inputs["distance"].astype(np.float64)
    return {
        "minute_of_day": minute.astype(np.float64),
        "block_min": block,
        "distance_mi": distance,
        "pad_min": block - distance / _MILES_PER_MINUTE,
        "airline": inputs["carrier"],
        "airport": inputs["origin"],
        "destination": inputs["dest"],
        "hour": _HOURS[minute // 60],
        "weekday": _WEEKDAYS[_weekday(day)],
    }


def _local(utc: NDArray[np.datetime64]) -> NDArray[np.datetime64]:
    """Return New York's wall clock. Its offset only changes on the hour, so a table by hour serves."""
    hour = utc.astype("datetime64[h]").astype(np.int64)
    first, offsets = _offsets(int(hour.min()) // _TABLE_HOURS, int(hour.max()) // _TABLE_HOURS)
    return utc + offsets[hour - first]


@lru_cache(maxsize=32)
def _offsets(first_block: int, last_block: int) -> tuple[int, NDArray[np.timedelta64]]:
    first, last = first_block * _TABLE_HOURS, (last_block + 1) * _TABLE_HOURS
    utc = np.arange(first, last).astype("datetime64[h]").astype("datetime64[us]")
    zoned = pa.array(utc).cast(_UTC).cast(_NEW_YORK)
    local = pc.local_timestamp(zoned).to_numpy(zero_copy_only=False)
    return first, local - utc


def _weekday(day: NDArray[np.datetime64]) -> NDArray[np.int64]:
    # 1970-01-01 was a Thursday.
    return (day.astype(np.int64) + _THURSDAY) % 7
