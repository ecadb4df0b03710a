"""What a serving replica tells the monitor: counts and rows since it last told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from mlops_ray.metadata.profile import Profile

MONITOR_ACTOR = "mlops-ray-monitor:{project}"
"""Name of the Ray actor that receives deltas, in Ray namespace ``MONITOR_NAMESPACE``."""

MONITOR_NAMESPACE = "mlops-ray"

LABEL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int8()),
        ("known_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""Labels as they came in, in order; one id may come more than once: the last one counts."""


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
    """News of one replica for one answering model version.

    ``buckets`` holds the feature counts of the new predictions by the UTC day of their prediction
    time (``2013-03-01``), binned by the reference profile with ``reference_digest``. ``predictions``
    has ``prediction_schema`` with a column ``shadow_<alias>`` for each model in shadow; ``labels``
    has ``LABEL_SCHEMA``. ``part`` names the files of the prediction log that hold the same rows, in its
    folders ``predictions`` and ``labels``: a receiver that lost its memory can read what it missed.
    Where there are only labels, ``version`` is 0 and ``reference_digest`` empty.
    """

    version: int
    reference_digest: str
    buckets: Mapping[str, Profile]
    predictions: pa.Table
    labels: pa.Table
    part: str = ""
