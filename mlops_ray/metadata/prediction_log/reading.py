"""Reading the prediction log: what is in the Delta tables, and what the replicas wrote since."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset as datasets

from mlops_ray.metadata.prediction_log.fitting import Fitting
from mlops_ray.metadata.prediction_log.frames import Frame
from mlops_ray.metadata.prediction_log.layout import (
    BATCH_ROUTE,
    DAY,
    INSTANT,
    LABELS,
    PREDICTIONS,
    SHADOW,
    Kind,
    frames_after,
    kept_segments,
    table_folder,
)
from mlops_ray.metadata.prediction_log.tables import open_table, read_positions

_BATCH_ROWS = 100_000
_ORDER = ("id", "received")


def scan_predictions(
    folder: Path,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    received_since: datetime | None = None,
    received_until: datetime | None = None,
    versions: Collection[int] | None = None,
    ids: Collection[str] | None = None,
    live: bool = False,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.Table]:
    """Yield the logged predictions in tables of bounded size, each row once.

    The columns are those of ``layout.PREDICTIONS``, ``shadow_<alias>`` of models in shadow, and the
    structs ``features`` and ``inputs``. What a table lacks was not logged for any of its rows.

    Args:
        folder: The project's prediction log.
        since: Earliest time of the request.
        until: Latest time of the request.
        received_since: Earliest time of the answer, by the server's clock; days before are not read.
        received_until: Latest time of the answer.
        versions: Only what these versions answered.
        ids: Only these predictions.
        live: Only what was asked of the endpoint, without the rows of batches.
        columns: Only these columns, in this order; null where they were not logged.
    """
    condition = _all(
        _between("time", since, until),
        _between("received", received_since, received_until),
        None if versions is None else pc.field("version").isin(pa.array(versions, pa.int64())),
        None if ids is None else pc.field("id").isin(pa.array(ids, pa.string())),
        pc.field("route") != BATCH_ROUTE if live else None,
    )
    for table in _scan(folder, "predictions", condition, columns, received_since, received_until):
        yield table if columns is None else _selected(table, columns)


def read_predictions(folder: Path, **conditions: Any) -> pa.Table:
    """Return the logged predictions as one table, by ``received``; see ``scan_predictions``.

    Of an id that was asked for more than once, as clients do that try again, the first answer stands.
    """
    columns = conditions.pop("columns", None)
    wanted = None if columns is None else [*dict.fromkeys((*columns, *_ORDER))]
    tables = list(scan_predictions(folder, columns=wanted, **conditions))
    table = pa.concat_tables([PREDICTIONS.empty_table(), *tables], promote_options="permissive")
    table = _one_of_each(table, last=False)
    return table if columns is None else _selected(table, columns)


def read_labels(
    folder: Path, *, ids: Collection[str] | None = None, horizon: timedelta | None = None
) -> pa.Table:
    """Return the labels with ``layout.LABELS``: of each id the one that was received last.

    With ``horizon`` only those count that became known within it of their prediction's time; labels
    without a prediction are then left out. Of labels received together, the one known last counts, and
    then the larger one: the rule by which the monitor joins labels.
    """
    condition = None if ids is None else pc.field("id").isin(pa.array(ids, pa.string()))
    tables = list(_scan(folder, "labels", condition, LABELS.names, None, None))
    table = pa.concat_tables([LABELS.empty_table(), *(t.select(LABELS.names) for t in tables)])
    if horizon is not None:
        predictions = read_predictions(folder, ids=ids, columns=("id", "time"))
        place = pc.index_in(table["id"], value_set=predictions["id"].combine_chunks())
        limit = pc.add(predictions["time"].take(place), pa.scalar(horizon, pa.duration("us")))
        table = table.filter(pc.less_equal(table["known_at"], limit))
    table = table.sort_by([("known_at", "ascending"), ("label", "ascending")])
    return _one_of_each(table, last=True)


def _selected(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    for name in columns:
        if name not in table.column_names:
            kind = pa.float64() if name.startswith(SHADOW) else pa.null()
            table = table.append_column(name, pa.nulls(table.num_rows, kind))
    return table.select(columns)


def _one_of_each(table: pa.Table, *, last: bool) -> pa.Table:
    """Return the first or last received row of each id, in the order of ``received``."""
    order = np.argsort(table["received"].cast(pa.int64()).to_numpy(), kind="stable")
    encoded = table["id"].combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)[order]
    # Numpy names the first place of each value.
    _, places = np.unique(codes[::-1] if last else codes, return_index=True)
    places = len(codes) - 1 - places if last else places
    return table.take(pa.array(order[np.sort(places)]))


def _scan(
    folder: Path,
    kind: Kind,
    condition: Any,
    columns: Sequence[str] | None,
    received_since: datetime | None,
    received_until: datetime | None,
) -> Iterator[pa.Table]:
    # Files are listed before the table is opened: what is moved to the table meanwhile is passed over
    # in them, and what was moved before is in the table that is opened.
    with kept_segments(folder) as found:
        table = open_table(folder, kind)
        reached = read_positions(folder, kind, table)
        fitting = Fitting(None if table is None else pa.schema(table.schema().to_arrow()))
        if table is not None:
            days = _days(received_since, received_until)
            yield from _stored(table, table_folder(folder, kind), condition, columns, days)
        for replica, files in found.items():
            for frame in frames_after(files, reached.get(replica, 0)):
                rows = _rows_of(frame, kind)
                if rows is not None:
                    rows = fitting.fit(rows)
                    rows = rows if condition is None else rows.filter(condition)
                    if rows.num_rows:
                        yield rows


def _stored(
    table: Any,
    folder: Path,
    condition: Any,
    columns: Sequence[str] | None,
    days: list[tuple[str, str, str]],
) -> Iterator[pa.Table]:
    paths = [str(folder / path) for path in table.file_uris(partition_filters=days or None)]
    if not paths:
        return
    schema = pa.schema([f for f in pa.schema(table.schema().to_arrow()) if f.name != DAY.name])
    wanted = None if columns is None else [name for name in columns if name in schema.names]
    stored = datasets.dataset(paths, schema=schema, format="parquet")
    for batch in stored.to_batches(columns=wanted, filter=condition, batch_size=_BATCH_ROWS):
        if batch.num_rows:
            yield pa.Table.from_batches([batch])


def _rows_of(frame: Frame, kind: Kind) -> pa.Table | None:
    return frame.predictions if kind == "predictions" else frame.labels


def _between(name: str, since: datetime | None, until: datetime | None) -> Any:
    low = None if since is None else pc.field(name) >= pa.scalar(since, INSTANT)
    high = None if until is None else pc.field(name) <= pa.scalar(until, INSTANT)
    return _all(low, high)


def _all(*conditions: Any) -> Any:
    total = None
    for condition in conditions:
        if condition is not None:
            total = condition if total is None else total & condition
    return total


def _days(since: datetime | None, until: datetime | None) -> list[tuple[str, str, str]]:
    bounds = [(">=", since), ("<=", until)]
    return [(DAY.name, sign, _day(at).isoformat()) for sign, at in bounds if at is not None]


def _day(moment: datetime) -> date:
    from datetime import UTC

    return moment.astimezone(UTC).date()
