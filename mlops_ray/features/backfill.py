"""Backfill of many tiles on Ray Data: entities are spread over partitions, each a task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from mlops_ray.features.streams import FeatureRows, WindowStream
from mlops_ray.features.tiles import Rows, WindowPlan, boundaries_of, cells_of
from mlops_ray.features.windows import emit

_PARTITION_ROWS = 25_000
_LEAST_PARTITIONS = 4


def backfill(stream: WindowStream, until_us: int) -> Iterator[FeatureRows]:
    """Advance a stream to ``until_us`` on the Ray cluster; yield its feature rows by partition.

    The rows, and their values to the bit, are those of ``stream.advance(until_us)``.
    """
    import ray.data

    rows = stream.history(until_us)
    after, upto = stream.passing(until_us)
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        partitions: Any = ray.data.from_arrow(list(_partitions(rows)))
        dataset = partitions.map_batches(
            compute_partition,
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            fn_kwargs={"plan": stream.plan, "after": after, "upto": upto},
        )
        for block in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
            if block.num_rows:
                yield _feature_rows(block, stream.plan)
        stream.skip(until_us)
    finally:
        context.enable_progress_bars = bars


def compute_partition(block: pa.Table, plan: WindowPlan, after: int, upto: int) -> pa.Table:
    """Return the features of all entities of a block at the boundaries in (after, upto]."""
    cells = cells_of(_rows(block, plan), plan)
    emitted = emit(cells, *boundaries_of(cells, after, upto), plan)
    columns: dict[str, Any] = {"entity": emitted.entity, "boundary_us": emitted.boundary_us}
    for at in range(plan.width):
        columns[f"value_{at}"] = np.ascontiguousarray(emitted.values[:, at])
        columns[f"null_{at}"] = np.ascontiguousarray(emitted.null[:, at])
    return pa.table(columns)


def _partitions(rows: Rows) -> Iterator[pa.Table]:
    """Spread the rows over partitions so that each entity lies in one of them."""
    count = max(_LEAST_PARTITIONS, len(rows) // _PARTITION_ROWS)
    home = rows.entity % count
    for number in range(count):
        yield _block(rows.take(home == number))


def _block(rows: Rows) -> pa.Table:
    columns: dict[str, Any] = {
        "entity": rows.entity,
        "event_us": rows.event_us,
        "arrival_us": rows.arrival_us,
    }
    for at, (values, valid) in enumerate(zip(rows.values, rows.valid, strict=True)):
        columns[f"value_{at}"] = values
        columns[f"valid_{at}"] = valid
    return pa.table(columns)


def _rows(block: pa.Table, plan: WindowPlan) -> Rows:
    count = len(plan.columns)
    return Rows(
        _numpy(block, "entity"),
        _numpy(block, "event_us"),
        _numpy(block, "arrival_us"),
        _matrix(block, "value", count, np.float64),
        _matrix(block, "valid", count, np.bool_),
    )


def _feature_rows(block: pa.Table, plan: WindowPlan) -> FeatureRows:
    boundary_us = _numpy(block, "boundary_us")
    values = np.ascontiguousarray(_matrix(block, "value", plan.width, np.float64).T)
    null = np.ascontiguousarray(_matrix(block, "null", plan.width, np.bool_).T)
    return FeatureRows(_numpy(block, "entity"), boundary_us, boundary_us, values, null)


def _matrix(block: pa.Table, name: str, count: int, dtype: Any) -> Any:
    matrix = np.empty((count, block.num_rows), dtype)
    for at in range(count):
        matrix[at] = _numpy(block, f"{name}_{at}")
    return matrix


def _numpy(block: pa.Table, name: str) -> Any:
    return block[name].to_numpy()
