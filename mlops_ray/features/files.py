"""The Parquet files of the offline store: sorted by entity and time, so that reads can skip."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import INSTANT, instants
from mlops_ray.features.definitions import CREATED_TIME, EVENT_TIME
from mlops_ray.features.keys import key_hash
from mlops_ray.metadata.files import sync

TAIL = -1
"""The bucket of small files that hold rows of any entity."""

TAIL_ROWS = 100_000
"""More rows than these lie in the buckets."""

GROUP_ROWS = 32_768
BATCH_ROWS = 65_536

Range = tuple[int, int]


@dataclass(frozen=True)
class WrittenFile:
    """A Parquet file of a view's table.

    ``path`` is relative to the table's folder. Its name begins with when it was written: of several
    rows with the same key and times, the one in the last file counts. ``event_us`` and
    ``created_us`` are the least and greatest times, None where they are not known.
    """

    path: str
    bucket: int
    rows: int
    size: int
    event_us: Range | None
    created_us: Range | None

    @property
    def order(self) -> str:
        """What sorts the files of a bucket by when their rows were written."""
        return self.path.rsplit("/", 1)[-1]

    def overlaps(self, since_us: int | None, until_us: int | None) -> bool:
        """Say whether there may be event times in [since, until]."""
        if self.event_us is None:
            return True
        first, last = self.event_us
        return not (
            (since_us is not None and last < since_us)
            or (until_us is not None and first > until_us)
        )


def buckets_of(rows: pa.Table, keys: Sequence[str], count: int) -> NDArray[np.int32]:
    """Return the bucket of each row's entity, int32 [n], from 0 to ``count`` − 1."""
    return (key_hash([rows[name] for name in keys]) % np.uint64(count)).astype(np.int32)


def sort_rows(rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    """Return the rows by key, event time and created time; equal ones keep their order."""
    columns = [instants(rows, CREATED_TIME, CREATED_TIME), instants(rows, EVENT_TIME, EVENT_TIME)]
    columns += [_rank(rows[name]) for name in reversed(keys)]
    if _ascends(columns[::-1]):
        return rows
    return rows.take(pa.array(np.lexsort(columns)))


def _rank(values: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return numbers that sort as the values do, a null before all."""
    whole = pa.types.is_integer(values.type)
    if whole and not values.null_count:
        return np.asarray(values.to_numpy(), np.int64)
    encoded = values.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order) + 1, np.int64)
    rank[order] = np.arange(len(order))
    rank[-1] = -1
    return rank[pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy()]


def _ascends(columns: Sequence[NDArray[np.int64]]) -> bool:
    """Say whether rows are sorted by these columns, the first one foremost."""
    equal = np.ones(max(len(columns[0]) - 1, 0), np.bool_)
    for values in columns:
        if (equal & (values[1:] < values[:-1])).any():
            return False
        equal &= values[1:] == values[:-1]
    return True


def write_file(
    folder: Path, bucket: int, rows: pa.Table, keys: Sequence[str], order_ns: int | None = None
) -> WrittenFile:
    """Write rows of one bucket, in any order, as a sorted file; no commit knows it yet.

    On return it survives a crash of the machine.
    """
    when = time.time_ns() if order_ns is None else order_ns
    path = f"bucket={bucket}/part-{when:020d}-{uuid.uuid4().hex[:12]}.parquet"
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_times(rows, target)
    rows = sort_rows(rows, keys)
    texts = [field.name for field in rows.schema if pa.types.is_string(field.type)]
    pq.write_table(
        rows,
        target,
        row_group_size=GROUP_ROWS,
        compression="lz4",
        use_dictionary=[*dict.fromkeys([*keys, *texts])],
    )
    sync(target)
    sync(target.parent)
    return WrittenFile(
        path,
        bucket,
        rows.num_rows,
        target.stat().st_size,
        _range(rows, EVENT_TIME),
        _range(rows, CREATED_TIME),
    )


def _check_times(rows: pa.Table, target: Path) -> None:
    for name in (EVENT_TIME, CREATED_TIME):
        if rows[name].null_count:
            raise FeatureStoreError(
                f"{rows[name].null_count} rows have no {name}",
                where=str(target.parent.parent),
                fix="leave such rows out, or give them a time",
            )


def order_ns(file: WrittenFile) -> int:
    """Return when the rows of a file were written, ns since 1970."""
    return int(file.order.split("-")[1])


def _range(rows: pa.Table, name: str) -> Range | None:
    ends = pc.min_max(rows[name].cast(pa.int64()))
    low, high = ends["min"].as_py(), ends["max"].as_py()
    return None if low is None else (low, high)


def read_batches(
    folder: Path,
    file: WrittenFile,
    schema: pa.Schema,
    since_us: int | None = None,
    until_us: int | None = None,
) -> Iterator[pa.Table]:
    """Yield a file's rows with ``since_us`` ≤ event time ≤ ``until_us``, a bounded number each.

    Columns of ``schema`` that the file does not have are null.
    """
    narrowed = since_us is not None or until_us is not None
    names = schema.names
    if narrowed and EVENT_TIME not in names:
        names = [*names, EVENT_TIME]
    with open_file(folder, file) as parquet:
        stored = [name for name in names if name in parquet.schema_arrow.names]
        groups = groups_between(parquet, since_us, until_us)
        if not groups:
            return
        for batch in parquet.iter_batches(
            BATCH_ROWS, row_groups=groups, columns=stored, use_threads=False
        ):
            rows = pa.Table.from_batches([batch])
            if narrowed:
                rows = rows.filter(_between(rows[EVENT_TIME], since_us, until_us))
            if rows.num_rows:
                yield conform(rows, schema)


def read_file(
    folder: Path,
    file: WrittenFile,
    schema: pa.Schema,
    since_us: int | None = None,
    until_us: int | None = None,
) -> pa.Table:
    """Return a file's rows with ``since_us`` ≤ event time ≤ ``until_us``."""
    batches = list(read_batches(folder, file, schema, since_us, until_us))
    return pa.concat_tables(batches) if batches else schema.empty_table()


def open_file(folder: Path, file: WrittenFile) -> pq.ParquetFile:
    """Open a file for reading.

    Raises:
        FeatureStoreError: It is not there any more.
    """
    try:
        return pq.ParquetFile(folder / file.path)
    except FileNotFoundError as error:
        raise _deleted(folder, file) from error


def check_files(folder: Path, files: Iterable[WrittenFile]) -> None:
    """Make sure that files are there.

    Raises:
        FeatureStoreError: One is not there any more.
    """
    for file in files:
        if not (folder / file.path).exists():
            raise _deleted(folder, file)


def _deleted(folder: Path, file: WrittenFile) -> FeatureStoreError:
    return FeatureStoreError(
        "a file of an older version of the view is not there any more",
        where=str(folder / file.path),
        why="vacuum deleted it: no training manifest pinned the version",
        fix="read the newest version",
    )


def groups_between(
    parquet: pq.ParquetFile, since_us: int | None, until_us: int | None
) -> list[int]:
    """Return the row groups that may have event times in [since, until]."""
    metadata = parquet.metadata
    every = list(range(metadata.num_row_groups))
    if since_us is None and until_us is None:
        return every
    place = parquet.schema_arrow.names.index(EVENT_TIME)
    return [group for group in every if _group_overlaps(metadata, group, place, since_us, until_us)]


def _group_overlaps(
    metadata: Any, group: int, place: int, since_us: int | None, until_us: int | None
) -> bool:
    statistics = metadata.row_group(group).column(place).statistics
    if statistics is None or not statistics.has_min_max:
        return True
    # The raw values are whole µs; as datetimes some would be out of range.
    first, last = statistics.min_raw, statistics.max_raw
    return not (
        (since_us is not None and last < since_us) or (until_us is not None and first > until_us)
    )


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return rows with exactly the columns and types of ``schema``; what is missing is null."""
    columns = [
        rows[field.name].cast(field.type)
        if field.name in rows.column_names
        else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    if not columns:
        return rows.select([])
    return pa.table(columns, schema=schema)


def _between(times: pa.ChunkedArray, since_us: int | None, until_us: int | None) -> Any:
    kept = times.is_valid()
    if since_us is not None:
        kept = pc.and_kleene(kept, pc.greater_equal(times, pa.scalar(since_us, INSTANT)))
    if until_us is not None:
        kept = pc.and_kleene(kept, pc.less_equal(times, pa.scalar(until_us, INSTANT)))
    return kept


def by_bucket(rows: pa.Table, keys: Sequence[str], count: int) -> Mapping[int, pa.Table]:
    """Return the rows of each bucket that has any, in their order."""
    if not rows.num_rows:
        return {}
    bucket = buckets_of(rows, keys, count)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(count + 1))
    ordered = rows.take(pa.array(order))
    return {
        number: ordered.slice(ends[number], ends[number + 1] - ends[number])
        for number in range(count)
        if ends[number + 1] > ends[number]
    }
