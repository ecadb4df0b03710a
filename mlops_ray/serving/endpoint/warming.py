"""Requests that nobody sent: what a replica tries new models with, before it is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson

from mlops_ray.config.features import RequestField


def sample_body(inputs: Mapping[str, RequestField], rows: int) -> bytes:
    """Return the body of a prediction request with values that the inputs allow."""
    row = {name: _value(field) for name, field in inputs.items()}
    return orjson.dumps({"rows": [row] * rows})


def _value(field: RequestField) -> Any:
    if field.dtype == "string":
        return "warm-up"
    if field.dtype == "bool":
        return False
    if field.dtype == "timestamp":
        return datetime.now(UTC).isoformat()
    low = -math.inf if field.minimum is None else field.minimum
    high = math.inf if field.maximum is None else field.maximum
    number = min(max(0.0, low), high)
    return math.ceil(number) if field.dtype == "int" else number
