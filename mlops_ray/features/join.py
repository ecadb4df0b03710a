"""The join of labels with a view's history: by bucket, in threads or as Ray tasks.

Only labels are shuffled. Each job reads, of one bucket, what lies between its first label minus the
TTL and its last label; a bucket with very many labels, as a hot entity makes it, is cut by time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.features.columns import NO_TIME, instants, key_columns
from mlops_ray.features.definitions import ViewDefinition, define
from mlops_ray.features.files import TAIL, WrittenFile, by_bucket, read_file
from mlops_ray.features.keys import key_hash
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.parts import Asked, FilePart, Part, Rule, TablePart, match
from mlops_ray.features.results import ResultColumn, result_column
from mlops_ray.features.service import view_columns

Ints = NDArray[np.int64]

RAY_ROWS = 20_000_000
_JOB_LABELS = 1_000_000


@dataclass(frozen=True)
class Job:
    """What one job reads: files of a bucket, and rows of the tail."""

    folder: Path
    files: Sequence[WrittenFile]
    tail: pa.Table
    keys: Sequence[str]
    fields: Sequence[pa.Field]
    rule: Rule

    def fill(self, columns: Sequence[ResultColumn], places: Ints, asked: Asked) -> None:
        """Put the features as of each label at its place in the columns."""
        span = self.rule.span_us(asked.at_us)
        parts: list[Part] = [
            FilePart(self.folder, file, self.keys, *span)
            for file in self.files
            if file.overlaps(*span)
        ]
        # Whether the tail comes before or after files does not matter: rows of two commits never have
        # equal created times, and one commit writes only one of both.
        if self.tail.num_rows:
            parts.append(TablePart(self.tail, self.keys))
        fill_from(parts, asked, self.rule, self.fields, columns, places)


def join_view(
    features: Features,
    view: str,
    table: pa.Table,
    time: str,
    store: OfflineStore,
    version: int | None = None,
    *,
    on_ray: bool | None = None,
) -> dict[str, pa.Array]:
    """Return a view's features as of each row of ``table``, named ``<view>__<feature>``, typed.

    For each row: the entity's newest row with event time ≤ the row's ``time`` and an age within the
    view's TTL; with ``features.offline.known_only`` of those whose created time is ≤ ``time`` too;
    of several with that event time the one created last. Null where there is none or where that row
    has a null. The same values to the bit, however the work is divided.

    Args:
        features: The declarations.
        view: The view's name.
        table: Rows with the entity's key columns.
        time: Name of their time column.
        store: The offline store.
        version: The version of the view's table to read; the newest when None, −1 for no table yet.
        on_ray: Whether to work on the Ray cluster; None: where Ray is up and the view has more than
            20 million rows or labels.

    Raises:
        SchemaError: A key or time column is missing or has the wrong type.
        FeatureStoreError: There is no such version.
    """
    definition = define(features, view)
    asked = labels_of(definition, table, time)
    rule = Rule(definition.ttl_us, features.offline.known_only)
    files = store.files(view, version)
    columns = [result_column(field.type, table.num_rows) for field in _fields(definition)]
    rows = np.flatnonzero(asked.at_us != NO_TIME)
    if files and len(rows):
        jobs = _jobs(definition, store.path(view), files, asked, rows, rule, store.buckets(view))
        many = max(len(rows), sum(file.rows for file in files)) > RAY_ROWS
        run = _on_ray if (many and _ray_is_up() if on_ray is None else on_ray) else _in_threads
        run(jobs, asked, columns)
    return dict(
        zip(view_columns(features, view), (column.finish() for column in columns), strict=True)
    )


class HeldView:
    """The rows of a view held in memory, to be joined many times; see ``join_view``."""

    def __init__(
        self, features: Features, view: str, store: OfflineStore, version: int | None = None
    ) -> None:
        self._definition = define(features, view)
        self._names = view_columns(features, view)
        self._rule = Rule(self._definition.ttl_us, features.offline.known_only)
        self._part = TablePart(store.read(view, version), [*self._definition.keys])

    def join(self, table: pa.Table, time: str) -> dict[str, pa.Array]:
        """Return the view's features as of each row of ``table``."""
        asked = labels_of(self._definition, table, time)
        fields = _fields(self._definition)
        columns = [result_column(field.type, table.num_rows) for field in fields]
        places = np.arange(table.num_rows)
        fill_from([self._part], asked, self._rule, fields, columns, places)
        return dict(zip(self._names, (column.finish() for column in columns), strict=True))


def labels_of(definition: ViewDefinition, table: pa.Table, time: str) -> Asked:
    """Return the keys and times of labels.

    Raises:
        SchemaError: A column is missing or has the wrong type.
    """
    where = f"features.views.{definition.name}"
    keys = key_columns(table, definition.keys, where)
    return Asked([_whole(values) for values in keys], instants(table, time, where))


def fill_from(
    parts: Sequence[Part],
    asked: Asked,
    rule: Rule,
    fields: Sequence[pa.Field],
    columns: Sequence[ResultColumn],
    places: Ints,
) -> None:
    """Put the features as of each label at its place: of all parts' rows the newest one's.

    Of rows that are equal in event and created time it is the last part's.
    """
    count = len(asked.at_us)
    origin = np.full(count, -1, np.int64)
    row, event_us, created_us = (np.full(count, NO_TIME, np.int64) for _ in range(3))
    for number, part in enumerate(parts):
        theirs, event, created = match(part, asked, rule)
        newer = (event > event_us) | ((event == event_us) & (created >= created_us))
        better = np.flatnonzero((theirs >= 0) & newer)
        origin[better] = number
        for mine, other in ((row, theirs), (event_us, event), (created_us, created)):
            mine[better] = other[better]
    names = [field.name for field in fields]
    for number, part in enumerate(parts):
        labels = np.flatnonzero(origin == number)
        if not len(labels):
            continue
        for piece, rows in part.gather(row[labels], names):
            here = places[labels[piece]]
            for name, column in zip(names, columns, strict=True):
                if name in rows.column_names:
                    column.put(here, _whole(rows[name]))


def _jobs(
    definition: ViewDefinition,
    folder: Path,
    files: Sequence[WrittenFile],
    asked: Asked,
    rows: Ints,
    rule: Rule,
    buckets: int,
) -> Iterator[tuple[Job, Ints]]:
    """Yield the jobs, and which labels each is given."""
    keys, fields = [*definition.keys], _fields(definition)
    span = rule.span_us(asked.at_us[rows])
    files = [file for file in files if file.overlaps(*span)]
    tail = _read_tail(definition, folder, [file for file in files if file.bucket == TAIL], span)
    if all(file.bucket == TAIL for file in files):
        yield Job(folder, [], tail, keys, fields, rule), rows
        return
    tails = by_bucket(tail, keys, buckets)
    bucket = (key_hash(asked.keys)[rows] % np.uint64(buckets)).astype(np.uint16)
    order = rows[np.argsort(bucket, kind="stable")]
    ends = np.cumsum(np.bincount(bucket, minlength=buckets))
    for number, mine in enumerate(np.split(order, ends[:-1])):
        theirs = [file for file in files if file.bucket == number]
        part = tails.get(number, tail.slice(0, 0))
        if len(mine) and (theirs or part.num_rows):
            job = Job(folder, theirs, part, keys, fields, rule)
            for salt in _salts(mine, asked.at_us):
                yield job, salt


def _salts(labels: Ints, at_us: Ints) -> list[Ints]:
    """Cut the labels of a job by time where they are very many."""
    pieces = -(-len(labels) // _JOB_LABELS)
    if pieces == 1:
        return [labels]
    return np.array_split(labels[np.argsort(at_us[labels], kind="stable")], pieces)


def _read_tail(
    definition: ViewDefinition,
    folder: Path,
    files: Sequence[WrittenFile],
    span: tuple[int | None, int | None],
) -> pa.Table:
    schema = definition.schema
    with ThreadPoolExecutor(_cores()) as pool:
        tables = pool.map(lambda file: read_file(folder, file, schema, *span), files)
        return pa.concat_tables([schema.empty_table(), *tables])


def _in_threads(
    jobs: Iterator[tuple[Job, Ints]], asked: Asked, columns: Sequence[ResultColumn]
) -> None:
    """Run jobs in threads. Each fills places of its own, so none waits for another."""
    with ThreadPoolExecutor(_cores()) as pool:
        futures = [
            pool.submit(lambda job, mine: job.fill(columns, mine, asked.take(mine)), job, labels)
            for job, labels in jobs
        ]
        for future in futures:
            future.result()


def _on_ray(
    jobs: Iterator[tuple[Job, Ints]], asked: Asked, columns: Sequence[ResultColumn]
) -> None:
    """Run each job as a Ray task."""
    import ray

    task: Any = ray.remote(num_cpus=1)(_run_job)
    labels = {task.remote(job, asked.take(mine)): mine for job, mine in jobs}
    while labels:
        [done], _ = ray.wait(list(labels), num_returns=1)
        places = labels.pop(done)
        for column, values in zip(columns, ray.get(done), strict=True):
            column.put(places, values)


def _run_job(job: Job, asked: Asked) -> list[pa.Array]:
    count = len(asked.at_us)
    columns = [result_column(field.type, count) for field in job.fields]
    job.fill(columns, np.arange(count), asked)
    return [column.finish() for column in columns]


def _fields(definition: ViewDefinition) -> list[pa.Field]:
    return [definition.schema.field(name) for name in definition.feature_names]


def _whole(values: pa.ChunkedArray) -> pa.Array:
    return values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _ray_is_up() -> bool:
    import ray

    return bool(ray.is_initialized())
