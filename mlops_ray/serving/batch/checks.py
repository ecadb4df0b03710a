"""Whether rows are what a service declares: nulls, ranges, ids that come twice."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.config.features import RequestField
from mlops_ray.serving.batch.pieces import Chunk, Rows
from mlops_ray.serving.batch.texts import without

Bad = NDArray[np.bool_]


class RowChecker:
    """Checks typed rows.

    Args:
        fields: The service's inputs.
        identifier: A column that may hold no null, if any.
        repeated: The places of rows whose id another one had before, sorted.
    """

    def __init__(
        self, fields: Mapping[str, RequestField], identifier: str | None, repeated: Rows
    ) -> None:
        self._fields = fields
        self._identifier = identifier
        self._repeated = repeated

    def check(self, chunk: Chunk) -> Chunk:
        """Return the chunk without the rows that are refused, and those among the refused."""
        flaws: dict[int, tuple[str, str]] = {}
        for name, field in self._fields.items():
            for reason, bad in _flaws(chunk.table[name], field):
                _note(flaws, name, reason, bad)
        if self._identifier is not None:
            nulls = chunk.table[self._identifier].is_null()
            _note(flaws, self._identifier, "must not be null", np.asarray(nulls))
            again = np.isin(chunk.rows, self._repeated, assume_unique=True)
            _note(flaws, self._identifier, "comes twice", again)
        return without(chunk, flaws, chunk.table)


def _note(flaws: dict[int, tuple[str, str]], name: str, reason: str, bad: Bad) -> None:
    for place in np.flatnonzero(bad).tolist():
        flaws.setdefault(place, (name, reason))


def _flaws(values: pa.ChunkedArray, field: RequestField) -> list[tuple[str, Bad]]:
    """Return what is wrong with some of the values, and with which."""
    found: list[tuple[str, Bad]] = []
    if values.null_count and not field.nullable:
        found.append(("must not be null", np.asarray(values.is_null())))
    if field.dtype == "float":
        found += _not_finite(values, field)
    if field.dtype in ("int", "float") and len(values) > values.null_count:
        found += _out_of_range(values, field)
    return found


def _not_finite(values: pa.ChunkedArray, field: RequestField) -> list[tuple[str, Bad]]:
    if not pa.types.is_floating(values.type):
        return []
    numbers = np.asarray(values.to_numpy(), np.float64)
    if np.isfinite(numbers).all():
        return []
    valid = np.asarray(values.is_valid())
    wrong = np.isinf(numbers) if field.nullable else ~np.isfinite(numbers)
    return [("must be finite", wrong & valid)]


def _out_of_range(values: pa.ChunkedArray, field: RequestField) -> list[tuple[str, Bad]]:
    found = []
    if field.minimum is not None:
        low = pc.less(values, pa.scalar(field.minimum, pa.float64()))
        found.append((f"must be at least {field.minimum:g}", low))
    if field.maximum is not None:
        high = pc.greater(values, pa.scalar(field.maximum, pa.float64()))
        found.append((f"must be at most {field.maximum:g}", high))
    return [(reason, np.asarray(pc.fill_null(bad, False))) for reason, bad in found if _any(bad)]


def _any(bad: pa.ChunkedArray) -> bool:
    return bool(pc.any(bad).as_py())
