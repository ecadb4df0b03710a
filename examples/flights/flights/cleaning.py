"""From raw rows to rows that features are computed from: the label, and delays tamed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LATE_MINUTES = 15.0
_SOFT_MINUTES = 10.0


def clean_flights(raw: pa.Table) -> pa.Table:
    """Return the flights with the label and two columns for the trailing means.

    Added: ``late`` float64, 1 when the flight arrived more than 15 minutes late, 0 when it did not,
    null where there was no arrival (cancelled and diverted flights have no label);
    ``arr_log``, ``dep_log`` float64, the delays as sign(x)·log(1 + |x| / 10 min), so that one delay
    of a day does not outweigh a hundred of ten minutes in a mean.
    """
    late = pc.greater(raw["arr_delay"], LATE_MINUTES).cast(pa.float64())
    table = raw.append_column("late", late)
    for name in ("arr", "dep"):
        table = table.append_column(f"{name}_log", soft_log(raw[f"{name}_delay"]))
    return table


def soft_log(minutes: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return sign(x)·log(1 + |x| / 10) as float64; nulls stay null."""
    value = minutes.cast(pa.float64())
    size = pc.log1p(pc.divide(pc.abs(value), _SOFT_MINUTES))
    return pc.multiply(pc.sign(value), size)


def clean_weather(raw: pa.Table) -> pa.Table:
    """Return the weather without wind gusts that are stronger than any wind ever measured.

    A gust of over 200 mph is a fault of the instrument; it becomes null. Wind direction, which jumps
    at north, becomes two columns: ``wind_x``, ``wind_y`` float64, mph towards east and north.
    """
    plausible = pc.less(raw["wind_speed"], 200.0)
    speed = pc.if_else(plausible, raw["wind_speed"], pa.scalar(None, pa.float64()))
    angle = pc.multiply(raw["wind_dir"], np.pi / 180.0)
    table = raw.set_column(raw.schema.get_field_index("wind_speed"), "wind_speed", speed)
    table = table.append_column("wind_x", pc.multiply(speed, pc.sin(angle)))
    return table.append_column("wind_y", pc.multiply(speed, pc.cos(angle)))
