"""Statistics of the rows of one view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.config.features import DType, Features
from mlops_ray.features.definitions import CREATED_TIME, EVENT_TIME, define
from mlops_ray.features.offline import OfflineStore

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_MOST_FREQUENT = 5


class FeatureStatistics(Frozen):
    """One feature over all rows of its view.

    ``minimum`` and ``maximum`` are ISO 8601 texts for timestamps. ``quantiles`` are those of
    ``QUANTILES``, by t-digest; ``frequent`` are the most frequent values of a string or bool with
    their counts. Nulls are counted apart; NaN is counted and left out of the figures.
    """

    feature: str
    dtype: DType
    nulls: int
    nans: int = 0
    distinct: int | None = None
    minimum: int | float | str | None = None
    mean: float | None = None
    maximum: int | float | str | None = None
    quantiles: tuple[float, ...] = ()
    frequent: tuple[tuple[str, int], ...] = ()


class ViewStatistics(Frozen):
    """A view's rows at one version of its table."""

    view: str
    version: int
    rows: int
    entities: int
    oldest_event: Instant | None
    newest_event: Instant | None
    newest_created: Instant | None
    features: tuple[FeatureStatistics, ...]


def view_statistics(
    features: Features, store: OfflineStore, name: str, version: int | None = None
) -> ViewStatistics:
    """Return the statistics of a view; one column at a time is in memory.

    Raises:
        FeatureStoreError: There is no such view or version.
    """
    definition = define(features, name)
    read = store.version(name) if version is None else version
    times = store.read(name, read, columns=[EVENT_TIME, CREATED_TIME])
    events = pc.min_max(times[EVENT_TIME])
    return ViewStatistics(
        view=name,
        version=read,
        rows=times.num_rows,
        entities=_entities(store, name, read, list(definition.keys)),
        oldest_event=events["min"].as_py(),
        newest_event=events["max"].as_py(),
        newest_created=pc.max(times[CREATED_TIME]).as_py(),
        features=tuple(
            column_statistics(feature, dtype, store.read(name, read, columns=[feature])[feature])
            for feature, dtype in definition.features.items()
        ),
    )


def column_statistics(name: str, dtype: DType, values: pa.ChunkedArray) -> FeatureStatistics:
    """Return the statistics of one column of a declared type."""
    nulls = values.null_count
    present = values.drop_null()
    if dtype in ("string", "bool"):
        return FeatureStatistics(feature=name, dtype=dtype, nulls=nulls, **_frequencies(present))
    if dtype == "timestamp":
        bounds = pc.min_max(present)
        low, high = (bounds[end].as_py() for end in ("min", "max"))
        texts = {"minimum": low and low.isoformat(), "maximum": high and high.isoformat()}
        return FeatureStatistics(feature=name, dtype=dtype, nulls=nulls, **texts)
    nans = 0
    if dtype == "float":
        is_nan = pc.is_nan(present)
        nans = int(pc.sum(is_nan).as_py() or 0)
        present = present.filter(pc.invert(is_nan))
    figures = _figures(present)
    return FeatureStatistics(feature=name, dtype=dtype, nulls=nulls, nans=nans, **figures)


def _entities(store: OfflineStore, view: str, version: int, keys: Sequence[str]) -> int:
    table = store.read(view, version, columns=list(keys))
    return int(table.group_by(list(keys)).aggregate([]).num_rows)


def _figures(values: pa.ChunkedArray) -> dict[str, Any]:
    if not len(values):
        return {}
    bounds = pc.min_max(values)
    return {
        "minimum": bounds["min"].as_py(),
        "mean": pc.mean(values).as_py(),
        "maximum": bounds["max"].as_py(),
        "quantiles": tuple(pc.tdigest(values, q=list(QUANTILES)).to_pylist()),
    }


def _frequencies(values: pa.ChunkedArray) -> dict[str, Any]:
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.string())
    counts = pa.table({"value": values}).group_by("value").aggregate([("value", "count")])
    ordered = counts.sort_by([("value_count", "descending"), ("value", "ascending")])
    top = ordered.slice(0, _MOST_FREQUENT).to_pylist()
    frequent = tuple((str(row["value"]), int(row["value_count"])) for row in top)
    return {"distinct": counts.num_rows, "frequent": frequent}
