"""Point-in-time join in memory: our kernel against polars' join_asof, same labels and rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from mlops_ray.features.asof import asof_join

REPEATS = 5
TTL_US = 12 * 3600 * 1_000_000
YEAR_US = 365 * 24 * 3600 * 1_000_000


def run(*, quick: bool) -> list[dict[str, Any]]:
    labels, rows = (20_000, 100_000) if quick else (1_000_000, 5_000_000)
    entities = rows // 50
    random = np.random.default_rng(0)
    label_entity = random.integers(0, entities, labels)
    label_us = random.integers(0, YEAR_US, labels)
    row_entity = random.integers(0, entities, rows)
    event_us = random.integers(0, YEAR_US, rows)
    value = random.normal(size=rows)

    def ours() -> Any:
        found = asof_join(label_entity, label_us, row_entity, event_us, event_us, ttl_us=TTL_US)
        return np.where(found >= 0, value[found], np.nan)

    left = pl.DataFrame({"e": label_entity, "t": label_us})
    right = pl.DataFrame({"e": row_entity, "t": event_us, "v": value})

    def peer() -> Any:
        ordered = left.with_row_index("i").sort("t")
        joined = ordered.join_asof(right.sort("t"), on="t", by="e", tolerance=TTL_US)
        return joined.sort("i")["v"].to_numpy()

    a, b = ours(), peer()
    assert np.array_equal(np.nan_to_num(a, nan=-9.0), np.nan_to_num(b, nan=-9.0))
    mine, theirs = alternate(ours, peer)
    return [
        {
            "metric": "ttl_12h_s",
            "value": statistics.median(mine),
            "spread": max(mine) - min(mine),
            "unit": "s",
            "peer": f"polars {pl.__version__}",
            "peer_value": statistics.median(theirs),
            "speedup": statistics.median(theirs) / statistics.median(mine),
        }
    ]


def alternate(
    first: Callable[[], Any], second: Callable[[], Any]
) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for function, taken in zip((first, second), times, strict=True):
            began = time.perf_counter()
            function()
            taken.append(time.perf_counter() - began)
    return times
