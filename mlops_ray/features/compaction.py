"""Upkeep of a view's table: small files become sorted ones, files that nothing needs are deleted."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import delta_log
from mlops_ray.features.delta_log import ConcurrentCommitError
from mlops_ray.features.files import (
    TAIL,
    TAIL_ROWS,
    WrittenFile,
    buckets_of,
    by_bucket,
    order_ns,
    read_batches,
    write_file,
)

logger = logging.getLogger(__name__)

_ROUND_ROWS = 5_000_000
_GROWTH = 4
_ATTEMPTS = 20


def compact(folder: Path, keys: Sequence[str]) -> int:
    """Merge small files into sorted ones, in one commit; return the table's version.

    A tail of few rows becomes one file; a longer one is spread over the buckets. In a bucket a file
    is merged where it has at most four times the rows that are merged into it, so each row is
    written again only a few times while a table grows. Others may commit in between; where one of
    them took some of these files out, all is left as it is.

    Raises:
        FeatureStoreError: Others kept committing.
    """
    table = delta_log.open_table(folder)
    if table is None:
        return -1
    schema, count = delta_log.stored_schema(table), delta_log.bucket_count(table)
    files = delta_log.files_of(table)
    tail = [file for file in files if file.bucket == TAIL]
    if _rows(tail) <= TAIL_ROWS:
        spread, runs = [], {TAIL: tail} if len(tail) > 1 else {}
    else:
        spread, runs = tail, {}
    runs |= _choose(files, count, _rows(spread) // count)
    if not spread and not runs:
        return int(table.version())
    added = list(_merge(folder, schema, keys, count, spread, runs))
    removed = [*spread, *(file for merged in runs.values() for file in merged)]
    return _swap(folder, added, removed)


def tidy(folder: Path, keys: Sequence[str]) -> None:
    """Keep the tail short: merge its small files into one, or spread it where it is long.

    Nothing is merged where another commit comes in between. What fails is logged only: the rows are
    stored, and another commit tries again.
    """
    try:
        _tidy(folder, keys)
    except Exception:
        logger.exception("the small files of %s are not merged", folder)


def _tidy(folder: Path, keys: Sequence[str]) -> None:
    table = delta_log.open_table(folder)
    files = [file for file in delta_log.files_of(table) if file.bucket == TAIL]
    if _rows(files) > TAIL_ROWS:
        compact(folder, keys)
        return
    small = _small(files, 0)
    if len(small) < 2:
        return
    added = list(_merge(folder, delta_log.stored_schema(table), keys, 1, [], {TAIL: small}))
    try:
        delta_log.commit(table, folder, added, small)
    except ConcurrentCommitError:
        _forget(folder, added)


def _choose(files: Iterable[WrittenFile], count: int, share: int) -> dict[int, list[WrittenFile]]:
    """Return the files to merge by bucket, where each is given about ``share`` rows of the tail."""
    buckets: dict[int, list[WrittenFile]] = defaultdict(list)
    for file in files:
        if file.bucket != TAIL:
            buckets[file.bucket].append(file)
    chosen = {}
    for bucket, stored in buckets.items():
        small = _small(stored, share)
        if small and (share or len(small) > 1):
            chosen[bucket] = small
    return chosen


def _small(files: Sequence[WrittenFile], rows: int) -> list[WrittenFile]:
    """Return the files that are small beside all smaller ones and ``rows`` more rows.

    And those written between them: of rows with equal times the last written one counts, and a
    merged file is as young as its youngest row.
    """
    small: list[WrittenFile] = []
    for file in sorted(files, key=lambda file: file.rows):
        if rows and file.rows > _GROWTH * rows:
            break
        small.append(file)
        rows += file.rows
    orders = [file.order for file in small]
    return [file for file in files if orders and min(orders) <= file.order <= max(orders)]


def _forget(folder: Path, files: Iterable[WrittenFile]) -> None:
    for file in files:
        (folder / file.path).unlink(missing_ok=True)


def _merge(
    folder: Path,
    schema: pa.Schema,
    keys: Sequence[str],
    count: int,
    spread: Sequence[WrittenFile],
    runs: dict[int, list[WrittenFile]],
) -> Iterator[WrittenFile]:
    """Write the merged files: of a few buckets in each round, so that a long tail fits in memory."""
    rounds = min(count, 1 + _rows(spread) // _ROUND_ROWS)
    for bucket, files in runs.items():
        if bucket == TAIL:
            yield _write(folder, bucket, [*_read(folder, files, schema)], keys, files)
    for turn in range(rounds):
        tail: dict[int, list[pa.Table]] = defaultdict(list)
        for rows in _read(folder, spread, schema):
            mine = rows.filter(pa.array(buckets_of(rows, keys, count) % rounds == turn))
            for bucket, part in by_bucket(mine, keys, count).items():
                tail[bucket].append(part)
        for bucket in range(turn, count, rounds):
            files = runs.get(bucket, [])
            parts = [*_read(folder, files, schema), *tail.pop(bucket, [])]
            if parts:
                yield _write(folder, bucket, parts, keys, [*files, *spread])


def _read(folder: Path, files: Sequence[WrittenFile], schema: pa.Schema) -> Iterator[pa.Table]:
    for file in sorted(files, key=lambda file: file.order):
        yield from read_batches(folder, file, schema)


def _write(
    folder: Path,
    bucket: int,
    parts: Sequence[pa.Table],
    keys: Sequence[str],
    origin: Sequence[WrittenFile],
) -> WrittenFile:
    newest_ns = max(order_ns(file) for file in origin)
    return write_file(folder, bucket, pa.concat_tables(parts), keys, newest_ns)


def _swap(folder: Path, added: Sequence[WrittenFile], removed: Sequence[WrittenFile]) -> int:
    for attempt in range(_ATTEMPTS):
        table = delta_log.open_table(folder)
        there = {file.path for file in delta_log.files_of(table)}
        if not there >= {file.path for file in removed}:
            _forget(folder, added)
            return int(table.version())
        try:
            return delta_log.commit(table, folder, added, removed)
        except ConcurrentCommitError:
            time.sleep(0.01 * np.random.default_rng().random() * 2 ** min(attempt, 6))
    raise FeatureStoreError(
        "compaction found no moment to commit",
        where=str(folder),
        why=f"other writers committed at each of {_ATTEMPTS} attempts",
        fix="run it again when less is written",
    )


def vacuum(folder: Path, pinned: Collection[int], retention: timedelta, dry_run: bool) -> list[str]:
    """Delete the files that are needed by no pinned version, nor the newest, nor a recent one.

    A version is recent when it was the newest at some moment of the last ``retention``. A file that
    no version knows is deleted when it is older than that.
    """
    table = delta_log.open_table(folder)
    if table is None:
        return []
    newest = int(table.version())
    limit_us = time.time_ns() // 1000 - retention // timedelta(microseconds=1)
    oldest = max(0, delta_log.version_at(folder, newest, limit_us))
    needed = {file.path for file in delta_log.files_of(table)}
    for version in {oldest, *pinned}:
        needed |= {file.path for file in delta_log.files_of(delta_log.open_table(folder, version))}
    needed |= {file.path for file in delta_log.added_files(folder, oldest, newest)}
    found = []
    for file in sorted(folder.glob("bucket=*/*.parquet")):
        path = file.relative_to(folder).as_posix()
        if path not in needed and file.stat().st_mtime_ns // 1000 <= limit_us:
            found.append(path)
            if not dry_run:
                file.unlink(missing_ok=True)
    return found


def _rows(files: Iterable[WrittenFile]) -> int:
    return sum(file.rows for file in files)
