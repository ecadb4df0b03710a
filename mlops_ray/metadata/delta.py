"""What the monitor takes in: counts, predictions and labels since it last looked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from mlops_ray.metadata.profile import Profile

MONITOR_ACTOR = "mlops-ray-monitor:{project}"
"""Name of the Ray actor that monitors a project, in Ray namespace ``MONITOR_NAMESPACE``."""

MONITOR_NAMESPACE = "mlops-ray"

LABEL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int8()),
        ("known_at", pa.timestamp("us", tz="UTC")),
        ("received", pa.timestamp("us", tz="UTC")),
    ]
)
"""Labels as they came in. One id may come more than once: of those that became known in time, the one
received last counts."""


def prediction_schema(shadows: tuple[str, ...] = ()) -> pa.Schema:
    """Return the schema of ``Delta.predictions`` for an answer with these shadow aliases."""
    fixed = [
        ("id", pa.string()),
        ("time", pa.timestamp("us", tz="UTC")),
        ("score", pa.float64()),
        ("version", pa.int64()),
    ]
    return pa.schema(fixed + [(f"shadow_{alias}", pa.float64()) for alias in shadows])


@dataclass(frozen=True)
class Delta:
    """What replicas have answered and been told since the monitor last looked.

    ``buckets`` holds the feature counts of the new predictions: by the digest of the reference
    profile that they were binned with, then by the UTC day of the prediction time (``2013-03-01``).
    ``predictions`` has ``prediction_schema`` with a column ``shadow_<alias>`` for each model in
    shadow; ``labels`` has ``LABEL_SCHEMA``. ``positions`` says up to where in the log of each replica
    this goes: see ``prediction_log.news.read_news``. ``gone`` are replicas of which nothing is left to
    read, and ``more`` says that there was more to read than this.
    """

    buckets: Mapping[str, Mapping[str, Profile]]
    predictions: pa.Table
    labels: pa.Table
    positions: Mapping[str, int]
    gone: frozenset[str] = frozenset()
    more: bool = False
