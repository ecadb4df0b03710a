"""From raw rows to rows that features are computed from: the label, delays tamed, faults removed."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

LATE_MINUTES = 15.0
STRONGEST_WIND_MPH = 200.0
_SOFT_MINUTES = 10.0


def clean_flights(raw: pa.Table) -> pa.Table:
    """Return the flights with the label and a column for the trailing means.

    Added: ``late`` float64, 1 when the flight arrived more than 15 minutes late, 0 when it did not,
    null where there was no arrival (cancelled and diverted flights have no label);
    ``arr_log`` float64, the delay as sign(x)·log(1 + |x| / 10 min), so that one delay of a day does
    not outweigh a hundred of ten minutes in a mean.
    """
    late = pc.greater(raw["arr_delay"], LATE_MINUTES).cast(pa.float64())
    return raw.append_column("late", late).append_column("arr_log", soft_log(raw["arr_delay"]))


def soft_log(minutes: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return sign(x)·log(1 + |x| / 10) as float64; nulls stay null."""
    value = minutes.cast(pa.float64())
    size = pc.log1p(pc.divide(pc.abs(value), _SOFT_MINUTES))
    return pc.multiply(pc.sign(value), size)


def clean_weather(raw: pa.Table) -> pa.Table:
    """Return the weather without winds stronger than any ever measured: instrument faults, now null."""
    table = raw
    for name in ("wind_speed", "wind_gust"):
        plausible = pc.less(table[name], STRONGEST_WIND_MPH)
        value = pc.if_else(plausible, table[name], pa.scalar(None, pa.float64()))
        table = table.set_column(table.schema.get_field_index(name), name, value)
    return table
