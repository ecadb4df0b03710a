"""Labels that come hours later, joined to the predictions that they judge."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TIMESTAMP = pa.timestamp("us", tz="UTC")
PREDICTION = pa.schema(
    [("id", pa.string()), ("time", TIMESTAMP), ("version", pa.int64()), ("score", pa.float64())]
)
LABEL = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.float64()),
        ("known_at", TIMESTAMP),
        ("received", TIMESTAMP),
    ]
)
SHADOW = "shadow_"

_NEWEST_FIRST = [(name, "descending") for name in ("received", "known_at", "label")]


class LabelJoin:
    """Predictions and labels joined by id, whatever the order in which they come.

    Both may come late, out of order, or more than once. The first prediction of an id stands. Of
    its labels, those count that became known within ``horizon`` of the prediction's time, and of
    these the one received last; so a label can be corrected, and adding the same table again changes
    nothing. (Of labels received together, the one known last counts, and then the larger one: the
    rule of ``prediction_log.reading.read_labels``.) Memory is bounded: ``forget`` drops predictions
    older than ``keep`` and unmatched labels older than ``horizon``.

    Args:
        horizon: The longest wait for a label.
        keep: For how long rows are kept, at least ``horizon``.
    """

    def __init__(self, horizon: timedelta, keep: timedelta) -> None:
        self.horizon = horizon
        self.keep = max(keep, horizon)
        self._rows = _labelled_schema(PREDICTION).empty_table()
        self._unmatched = LABEL.empty_table()
        self._new_predictions: list[pa.Table] = []
        self._new_labels: list[pa.Table] = []

    def add_predictions(self, predictions: pa.Table) -> None:
        """Add rows with the columns of ``PREDICTION`` and any float columns ``shadow_<alias>``."""
        self._new_predictions.append(_conform(predictions, _prediction_schema(predictions)))

    def add_labels(self, labels: pa.Table) -> None:
        """Add rows with the columns of ``LABEL``. Rows without all of them are dropped."""
        self._new_labels.append(_conform(labels, LABEL).drop_null())

    def forget(self, now: datetime) -> None:
        """Drop what is too old at ``now`` to matter any more."""
        self._settle()
        self._rows = self._rows.filter(pc.greater_equal(self._rows["time"], _at(now - self.keep)))
        known_at = self._unmatched["known_at"]
        kept = pc.greater_equal(known_at, _at(now - self.horizon))
        self._unmatched = self._unmatched.filter(kept)

    def rows(self, since: datetime, until: datetime, version: int | None = None) -> pa.Table:
        """Return the predictions with time in [since, until), of one version or of all.

        Columns: those of ``PREDICTION``, ``shadow_<alias>`` float64, ``label`` float64 and
        ``known_at``, both null while the label is unknown. Sorted by (time, id).
        """
        self._settle()
        time = self._rows["time"]
        wanted = pc.and_(pc.greater_equal(time, _at(since)), pc.less(time, _at(until)))
        if version is not None:
            wanted = pc.and_(wanted, pc.equal(self._rows["version"], version))
        rows = self._rows.filter(wanted).drop_columns("received")
        return rows.sort_by([("time", "ascending"), ("id", "ascending")])

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Return everything held: all rows, and the labels without a prediction."""
        self._settle()
        return self._rows, self._unmatched

    def restore(self, rows: pa.Table, unmatched: pa.Table) -> None:
        """Take over what ``tables`` returned, in place of everything held."""
        self._rows, self._unmatched = rows.combine_chunks(), unmatched.combine_chunks()
        self._new_predictions, self._new_labels = [], []

    def _settle(self) -> None:
        """Join what was added since the last time."""
        if not self._new_predictions and not self._new_labels:
            return
        arrived = [_with_empty_label(table) for table in self._new_predictions]
        rows = pa.concat_tables([self._rows, *arrived], promote_options="default")
        rows = _first_of_each(rows.combine_chunks(), "id")
        labels = pa.concat_tables([self._unmatched, *self._new_labels]).sort_by(_NEWEST_FIRST)
        labels = _first_of_each(labels.combine_chunks(), "id", "known_at")
        self._new_predictions, self._new_labels = [], []
        place = pc.index_in(_column(labels, "id"), value_set=_column(rows, "id"))
        self._rows = self._fill(rows, labels.filter(pc.is_valid(place)), place.drop_null())
        self._unmatched = labels.filter(pc.is_null(place))

    def _fill(self, rows: pa.Table, labels: pa.Table, place: pa.Array) -> pa.Table:
        """Put the labels, each of which belongs to the row at its ``place``, where they count."""
        judged = rows.take(place)
        limit = pc.add(judged["time"], pa.scalar(self.horizon, pa.duration("us")))
        in_time = labels.filter(pc.less_equal(labels["known_at"], limit))
        known = judged.filter(pc.is_valid(judged["label"])).select(LABEL.names)
        labels = pa.concat_tables([known, in_time]).sort_by(_NEWEST_FIRST)
        found = pc.index_in(_column(rows, "id"), value_set=_column(labels, "id"))
        for name in LABEL.names[1:]:
            values = pc.coalesce(labels[name].take(found), rows[name])
            rows = rows.set_column(rows.schema.get_field_index(name), name, values)
        return rows


def shadow_aliases(rows: pa.Table) -> list[str]:
    """Return the aliases whose shadow scores the rows carry."""
    return [name.removeprefix(SHADOW) for name in rows.column_names if name.startswith(SHADOW)]


def _prediction_schema(table: pa.Table) -> pa.Schema:
    shadows = [name for name in table.column_names if name.startswith(SHADOW)]
    return pa.schema([*PREDICTION, *((name, pa.float64()) for name in shadows)])


def _labelled_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([*schema, *(field for field in LABEL if field.name != "id")])


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return table.select(schema.names).cast(schema)


def _with_empty_label(table: pa.Table) -> pa.Table:
    for name in LABEL.names[1:]:
        table = table.append_column(name, pa.nulls(len(table), LABEL.field(name).type))
    return table


def _first_of_each(table: pa.Table, *keys: str) -> pa.Table:
    """Keep the first row of each combination of the keys, in order."""
    codes = [_column(table, key).dictionary_encode().indices.to_numpy(False) for key in keys]
    _, first = np.unique(np.column_stack(codes), axis=0, return_index=True)
    return table if len(first) == len(table) else table.take(pa.array(np.sort(first)))


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _at(moment: datetime) -> pa.Scalar:
    return pa.scalar(moment, TIMESTAMP)
