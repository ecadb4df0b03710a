"""Training sets: labelled rows with the features that were known at their prediction times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.errors import SchemaError
from mlops_ray.features.columns import INSTANT, column, instants, to_instants, wrong_type
from mlops_ray.features.join import join_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.service import (
    find_service,
    inputs_of,
    on_demand_features,
    on_demand_views,
    stored_columns,
)


@dataclass(frozen=True)
class LabelCount:
    """What became of the rows of the label source.

    ``unlabelled`` rows have no label and never will, as far as is known (cancelled flights);
    ``unknown`` ones have a label that was not known yet.
    """

    labelled: int
    unlabelled: int
    unknown: int


def labelled_rows(
    table: pa.Table, features: Features, until: datetime | None
) -> tuple[pa.Table, LabelCount]:
    """Return the rows whose label is known by ``until``, sorted by (time, id), and the counts.

    Raises:
        SchemaError: A column is missing or has the wrong type.
    """
    labels = features.labels
    where = f"features.labels ({labels.source})"
    label = column(table, labels.label, where)
    kind = label.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise wrong_type(labels.label, "0 or 1", kind, where)
    column(table, labels.id, where)
    instants(table, labels.time, where)
    instants(table, labels.known_at, where)
    has_label = pc.and_(pc.is_valid(label), pc.is_valid(table[labels.time]))
    known = pc.and_(has_label, pc.is_valid(table[labels.known_at]))
    if until is not None:
        known_at = to_instants(table[labels.known_at], where)
        in_time = pc.less_equal(known_at, pa.scalar(until, INSTANT))
        known = pc.and_(known, pc.fill_null(in_time, False))
    rows = table.filter(known)
    present = int(pc.sum(has_label).as_py() or 0)
    count = LabelCount(rows.num_rows, table.num_rows - present, present - rows.num_rows)
    return rows.sort_by([(labels.time, "ascending"), (labels.id, "ascending")]), count


def build_training_set(
    features: Features,
    service: str,
    table: pa.Table,
    store: OfflineStore,
    versions: Mapping[str, int],
    until: datetime | None,
    *,
    on_ray: bool | None = None,
) -> tuple[pa.Table, LabelCount]:
    """Return the training set of a service, and what became of the label source's rows.

    Columns: id, time, known_at, label (int8, or float64 where the source's is a float), the service's
    other inputs, ``<view>__<feature>`` in its declared type, then on-demand features, float64 and
    string. An on-demand feature takes the place of an input of the same name. Rows are sorted by
    (time, id). The same arguments give the same bytes, whenever and wherever.

    Args:
        features: The declarations.
        service: The service's name.
        table: The cleaned rows of the label source.
        store: The offline store.
        versions: Which version of each view's table to read.
        until: Labels known later do not count; None takes all.
        on_ray: Whether to join on the Ray cluster; see ``join_view``.

    Raises:
        SchemaError: A column is missing or has the wrong type.
    """
    rows, count = labelled_rows(table, features, until)
    return join_service(features, service, rows, store, versions, on_ray=on_ray), count


def join_service(
    features: Features,
    service: str,
    rows: pa.Table,
    store: OfflineStore,
    versions: Mapping[str, int],
    *,
    on_ray: bool | None = None,
) -> pa.Table:
    """Return labelled rows with the service's features; see ``build_training_set``."""
    columns = label_columns(features, service, rows)
    time = features.labels.time
    for view in find_service(features, service).views:
        version = versions.get(view)
        columns |= join_view(features, view, rows, time, store, version, on_ray=on_ray)
    columns |= _on_demand_columns(features, service, rows, columns)
    return pa.table(columns).combine_chunks()


def label_columns(features: Features, service: str, rows: pa.Table) -> dict[str, Any]:
    """Return the label's columns and the service's inputs: all that is used of the label source."""
    columns = _label_columns(rows, features)
    for name in find_service(features, service).inputs:
        columns.setdefault(name, column(rows, name, f"inputs.{name}"))
    return columns


def _label_columns(rows: pa.Table, features: Features) -> dict[str, Any]:
    labels = features.labels
    label = rows[labels.label]
    dtype = pa.float64() if pa.types.is_floating(label.type) else pa.int8()
    return {
        labels.id: rows[labels.id],
        labels.time: to_instants(rows[labels.time], labels.time),
        labels.known_at: to_instants(rows[labels.known_at], labels.known_at),
        labels.label: label.cast(dtype),
    }


def _on_demand_columns(
    features: Features, service: str, rows: pa.Table, stored: Mapping[str, Any]
) -> dict[str, pa.Array]:
    declared = features.services[service]
    needed = {
        name: stored[name] for view in on_demand_views(features, service) for name in view.features
    }
    given = stored_columns(needed)
    computed = on_demand_features(features, service)(inputs_of(rows, declared), given)
    labels = features.labels
    taken = {labels.id, labels.time, labels.known_at, labels.label} & set(computed)
    if taken:
        raise SchemaError(
            f"on-demand features may not be called {', '.join(sorted(taken))}",
            where=f"features.services.{service}.on_demand",
            why="the label's columns have these names",
            fix="give the features other names",
        )
    return {name: _arrow(values) for name, values in computed.items()}


def _arrow(values: NDArray[Any]) -> pa.Array:
    if values.dtype == np.float64:
        return pa.array(values)
    return pa.array(values, pa.string(), from_pandas=True)
