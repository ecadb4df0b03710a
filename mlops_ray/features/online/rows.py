"""Feature rows on their way into an online store: the newest of each entity, packed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.definitions import CREATED_TIME, EVENT_TIME
from mlops_ray.features.online.encoding import encode_columns
from mlops_ray.features.online.layout import StoredView, pack

SLICE_ROWS = 1 << 16

_FEW_ROWS = 1000

stored_times = struct.Struct("<8xqq").unpack_from
"""Returns event time and created time of a packed row."""


def newest_rows(
    view: StoredView, rows: pa.Table, prefix: bytes = b"", most: int = SLICE_ROWS
) -> Iterator[dict[bytes, bytes]]:
    """Yield packed rows by key, the newest of each entity among at most ``most`` rows at a time.

    Rows whose key has a null are left out.

    Raises:
        FeatureStoreError: A column is missing or of another type, or a row has no time.
    """
    table = _thinned(view, _checked(view, rows))
    for start in range(0, table.num_rows, most):
        part = table.slice(start, most)
        event_us, created_us = (_instants(view, part, name) for name in (EVENT_TIME, CREATED_TIME))
        keys = encode_columns(prefix, [part[name].combine_chunks() for name in view.keys])
        values = pack(view.layout, event_us, created_us, part)
        newest = dict(zip(keys, values, strict=True))
        if len(newest) < len(keys):
            # The last of equal keys stays in a dict, so it must be the newest.
            order = np.lexsort((created_us, event_us)).tolist()
            newest = {keys[row]: values[row] for row in order}
        yield newest


def _checked(view: StoredView, rows: pa.Table) -> pa.Table:
    if not rows.schema.equals(view.schema):
        try:
            rows = rows.select(view.schema.names).cast(view.schema)
        except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise FeatureStoreError(
                f"the rows do not fit view {view.name!r}",
                why=f"{error}; they have {', '.join(f'{f.name}: {f.type}' for f in rows.schema)}",
                fix="give a table of the view's schema: keys, event_time, created_time, features",
            ) from error
    valid = [rows[name].is_valid() for name in view.keys if rows[name].null_count]
    return rows.filter(reduce(pc.and_, valid)) if valid else rows


def _thinned(view: StoredView, rows: pa.Table) -> pa.Table:
    """Leave out rows that the next one replaces: of a sorted history only the newest rows stay."""
    count = rows.num_rows
    if count < _FEW_ROWS:
        return rows
    event_us, created_us = (_instants(view, rows, name) for name in (EVENT_TIME, CREATED_TIME))
    replaced = _not_before(event_us, created_us)
    for name in view.keys:
        later, earlier = rows[name].slice(1), rows[name].slice(0, count - 1)
        replaced &= np.asarray(pc.equal(later, earlier).to_numpy())
    return rows.filter(pa.array(np.append(~replaced, True))) if replaced.any() else rows


def _instants(view: StoredView, rows: pa.Table, name: str) -> NDArray[np.int64]:
    if rows[name].null_count:
        raise FeatureStoreError(f"a row of view {view.name!r} has no {name}")
    return np.asarray(rows[name].to_numpy()).view(np.int64)


def _not_before(event_us: NDArray[np.int64], created_us: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each row but the first whether its times are at or after those of the row before."""
    same = event_us[1:] == event_us[:-1]
    return (event_us[1:] > event_us[:-1]) | (same & (created_us[1:] >= created_us[:-1]))
