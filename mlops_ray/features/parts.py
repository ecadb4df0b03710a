"""Parts of a view's history, sorted by entity and time, that labels are joined with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.features.asof import asof_join
from mlops_ray.features.columns import encode, instants
from mlops_ray.features.definitions import CREATED_TIME, EVENT_TIME
from mlops_ray.features.files import WrittenFile, groups_between, open_file, sort_rows

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """Labels: the entity's key columns in order, and the times in µs, int64 [n]."""

    keys: list[pa.Array]
    at_us: Ints

    def take(self, rows: Ints) -> Asked:
        """Return some of them."""
        places = pa.array(rows)
        return Asked([values.take(places) for values in self.keys], self.at_us[rows])


@dataclass(frozen=True)
class Rule:
    """Which rows may be used: see ``asof_join``."""

    ttl_us: int | None
    known_only: bool

    def span_us(self, at_us: Ints) -> tuple[int | None, int | None]:
        """Return the first and last event time that labels at these times can use."""
        since_us = None if self.ttl_us is None else int(at_us.min()) - self.ttl_us
        return since_us, int(at_us.max())


class Part(Protocol):
    """Rows sorted by key, event time and created time."""

    def index(self) -> pa.Table:
        """Return the key columns, event time and created time of all rows."""

    def gather(self, places: Ints, names: Sequence[str]) -> Iterator[tuple[Ints, pa.Table]]:
        """Yield, in pieces, numbers of ``places`` and the rows that they name.

        Columns that the part does not have are left out.
        """


class TablePart:
    """A part in memory."""

    def __init__(self, rows: pa.Table, keys: Sequence[str]) -> None:
        self._rows = sort_rows(rows, keys).combine_chunks()
        self._keys = keys

    def index(self) -> pa.Table:
        """Return the key columns, event time and created time of all rows."""
        return self._rows.select([*self._keys, EVENT_TIME, CREATED_TIME])

    def gather(self, places: Ints, names: Sequence[str]) -> Iterator[tuple[Ints, pa.Table]]:
        """Yield the rows at ``places``, in one piece."""
        yield np.arange(len(places)), self._rows.select(list(names)).take(pa.array(places))


class FilePart:
    """A file of the offline store, of which only the row groups are read that may matter."""

    def __init__(
        self,
        folder: Path,
        file: WrittenFile,
        keys: Sequence[str],
        since_us: int | None,
        until_us: int | None,
    ) -> None:
        self._folder = folder
        self._file = file
        self._keys = keys
        self._span = since_us, until_us

    def index(self) -> pa.Table:
        """Return the key columns, event time and created time of the rows that may matter."""
        with open_file(self._folder, self._file) as parquet:
            groups = groups_between(parquet, *self._span)
            names = [*self._keys, EVENT_TIME, CREATED_TIME]
            return parquet.read_row_groups(groups, columns=names, use_threads=False)

    def gather(self, places: Ints, names: Sequence[str]) -> Iterator[tuple[Ints, pa.Table]]:
        """Yield the rows at ``places``, one row group after the other."""
        order = np.argsort(places)
        with open_file(self._folder, self._file) as parquet:
            stored = [name for name in names if name in parquet.schema_arrow.names]
            groups = groups_between(parquet, *self._span)
            sizes = [parquet.metadata.row_group(group).num_rows for group in groups]
            starts = np.cumsum([0, *sizes])
            cuts = np.searchsorted(places[order], starts)
            for number, group in enumerate(groups):
                mine = order[cuts[number] : cuts[number + 1]]
                if len(mine):
                    rows = parquet.read_row_group(group, columns=stored, use_threads=False)
                    yield mine, rows.take(pa.array(places[mine] - starts[number]))


def match(part: Part, asked: Asked, rule: Rule) -> tuple[Ints, Ints, Ints]:
    """Return for each label its row in the part, −1 for none, and the row's event and created time."""
    index = part.index()
    keys = [index.column(at).combine_chunks() for at in range(len(asked.keys))]
    event_us = instants(index, EVENT_TIME, EVENT_TIME)
    created_us = instants(index, CREATED_TIME, CREATED_TIME)
    starts = _run_starts(keys, index.num_rows)
    place = asof_join(
        _runs_of(asked.keys, [values.take(pa.array(starts)) for values in keys]),
        asked.at_us,
        np.append(starts, index.num_rows),
        event_us,
        created_us,
        ttl_us=rule.ttl_us,
        known_only=rule.known_only,
    )
    if not index.num_rows:
        return place, place, place
    inside = np.maximum(place, 0)
    return place, event_us[inside], created_us[inside]


def _run_starts(keys: Sequence[pa.Array], count: int) -> Ints:
    """Return where in sorted rows another key begins."""
    if not count:
        return np.zeros(0, np.int64)
    begins = np.zeros(count, np.bool_)
    begins[0] = True
    for values in keys:
        begins[1:] |= _differs(values)
    return np.flatnonzero(begins)


def _differs(values: pa.Array) -> NDArray[np.bool_]:
    """Say of each value but the first whether it differs from the one before; null equals null."""
    if pa.types.is_integer(values.type) and not values.null_count:
        whole = values.to_numpy()
        return np.asarray(whole[1:] != whole[:-1])
    unequal = pc.not_equal(values.slice(1), values.slice(0, len(values) - 1))
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    known = pc.fill_null(unequal, False).to_numpy(zero_copy_only=False)
    return np.asarray(known | (valid[1:] != valid[:-1]))


def _runs_of(asked: Sequence[pa.Array], distinct: Sequence[pa.Array]) -> Ints:
    """Return for each asked key its place among distinct ones, −1 for none or where it has a null."""
    pairs = zip(distinct, asked, strict=True)
    codes, known = encode([pa.chunked_array([*pair]) for pair in pairs])
    runs = len(distinct[0])
    run_of = np.full(len(known[0]) + 1, -1, np.int64)
    # A null's code is −1: it marks the last place, which is set back after.
    run_of[codes[:runs]] = np.arange(runs)
    run_of[-1] = -1
    return run_of[codes[runs:]]
