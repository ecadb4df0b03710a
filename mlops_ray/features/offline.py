"""The offline store: the whole history of every view, in one Delta Lake table each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features import compaction, delta_log
from mlops_ray.features.columns import to_us
from mlops_ray.features.definitions import ViewDefinition, define
from mlops_ray.features.delta_log import ConcurrentCommitError, Mark
from mlops_ray.features.files import (
    WrittenFile,
    check_files,
    conform,
    read_batches,
    read_file,
    write_file,
)
from mlops_ray.features.intake import refuse_outside, write_rows
from mlops_ray.features.scan import scan_files

if TYPE_CHECKING:
    import ray.data

_DIGEST_LETTERS = 16
_ATTEMPTS = 5
_TIDY_EVERY = 64


class OfflineStore:
    """Append-only tables of feature rows, readable at any of their versions.

    A view lies in ``<root>/<view>/<digest of its definition>``. Its **watermark** is the moment, in
    µs since 1970, up to which all rows by created time are stored. It is committed with the rows,
    so a row is never stored twice: what lies at or below the watermark is not appended again.

    The **generation** says which code made the rows: the first rows of another generation take the
    place of all that are there, in one commit. Older versions stay readable.

    Small appends lie in files of the *tail*, which holds rows of any entity; large ones and compacted
    ones in files of ``features.offline.buckets`` buckets by entity, a number that a table keeps. A
    store can be pickled.
    """

    def __init__(self, root: Path, features: Features) -> None:
        self.root = root
        self._features = features
        self._writing: dict[str, Any] = {}
        self._births: dict[str, Any] = {}
        self._followed: dict[str, str] = {}
        self._marks: dict[str, tuple[int, Mark]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self._features)

    def path(self, view: str) -> Path:
        """Return the folder of a view's table; it may not be there yet."""
        definition = define(self._features, view)
        return self.root / view / definition.digest[:_DIGEST_LETTERS]

    def append(
        self,
        view: str,
        rows: pa.Table | Iterable[pa.Table],
        watermark_us: int,
        generation: str = "",
    ) -> int:
        """Append rows in one commit that also moves the watermark; return the table's version.

        Rows whose created time is not above the stored watermark are dropped: they are stored.

        Args:
            view: The view's name.
            rows: A table of the view's schema, a list of them, or an iterator to stream.
            watermark_us: Up to where, by created time, the view is complete with these rows.
            generation: Which code made the rows.

        Raises:
            FeatureStoreError: Another writer kept committing to this view at the same time, or it
                stored rows of another generation after this store went on from rows of this one;
                or the table was removed since. Or a row was created after ``watermark_us``. Nothing
                was written. An iterator cannot be read twice, so it has one attempt.
        """
        definition = define(self._features, view)
        tables = [rows] if isinstance(rows, pa.Table) else rows
        attempts = _ATTEMPTS if isinstance(tables, Sequence) else 1

        def once() -> int:
            table = self._table_to_write(definition)
            stored_us = self._stored(view, table, generation)
            if table is not None and stored_us is not None and stored_us >= watermark_us:
                return int(table.version())
            folder = self.path(view)
            files = write_rows(
                folder, definition, tables, stored_us, watermark_us, lambda: self._buckets(table)
            )
            return self._commit(definition, table, files, watermark_us, generation)

        version = _try(once, attempts)
        if version and version % _TIDY_EVERY == 0:
            compaction.tidy(self.path(view), [*definition.keys])
        return version

    def write_bucket(self, view: str, bucket: int, rows: pa.Table) -> WrittenFile:
        """Write rows of one bucket, in any order, to a file that ``commit`` puts into the table.

        The result can be pickled. ``buckets(view)`` says how many there are; ``files.buckets_of``
        gives the bucket of each row.
        """
        definition = define(self._features, view)
        return write_file(
            self.path(view), bucket, conform(rows, definition.schema), [*definition.keys]
        )

    def buckets(self, view: str) -> int:
        """Return into how many buckets a view is cut."""
        return self._buckets(self._open(view))

    def commit(
        self, view: str, files: Sequence[WrittenFile], watermark_us: int, generation: str = ""
    ) -> int:
        """Put files of ``write_bucket`` into the table and move the watermark, in one commit.

        Nothing is done where the watermark is there already. Returns the table's version.

        Raises:
            FeatureStoreError: Some of the files' rows may be stored already: another writer moved the
                watermark since they were made. Or as ``append``.
        """
        definition = define(self._features, view)

        def once() -> int:
            table = self._table_to_write(definition)
            stored_us = self._stored(view, table, generation)
            if table is not None and stored_us is not None and stored_us >= watermark_us:
                return int(table.version())
            refuse_outside(files, stored_us, watermark_us, self.path(view))
            return self._commit(definition, table, files, watermark_us, generation)

        return _try(once, _ATTEMPTS)

    def read(
        self,
        view: str,
        version: int | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Return the rows of a view with ``since`` ≤ event time ≤ ``until``.

        They come in no order that means anything, but in the same one whenever a version is read.

        Args:
            view: The view's name.
            version: A version of its table, the newest when None; −1 stands for no table yet.
            since: Earliest event time, if any.
            until: Latest event time, if any.
            columns: Which columns, all when None.

        Raises:
            FeatureStoreError: There is no such version, or it has a column of another type.
        """
        span = _span(since, until)
        schema = define(self._features, view).schema
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        folder = self.path(view)
        files = [file for file in self.files(view, version) if file.overlaps(*span)]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            tables = pool.map(lambda file: read_file(folder, file, schema, *span), files)
            return pa.concat_tables([schema.empty_table(), *tables])

    def scan(
        self,
        view: str,
        version: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> ray.data.Dataset:
        """Return the rows of a view with ``since`` ≤ event time ≤ ``until`` as a Ray Dataset.

        The files are read by tasks, in bounded memory; the version is chosen now.
        """
        span = _span(since, until)
        files = [file for file in self.files(view, version) if file.overlaps(*span)]
        return scan_files(self.path(view), files, define(self._features, view).schema, span)

    def files(self, view: str, version: int | None = None) -> list[WrittenFile]:
        """Return the files of a version, by bucket; of none yet where ``version`` is −1.

        Raises:
            FeatureStoreError: There is no such version, or it has a column of another type.
        """
        table = None if version == -1 else self._open(view, version)
        if table is None:
            return []
        self._check(define(self._features, view), table)
        return delta_log.files_of(table)

    def changes(self, view: str, after: int, upto: int | None = None) -> Iterator[pa.Table]:
        """Return the rows that the commits in (after, upto] added, a bounded number at a time.

        Compaction adds none. ``upto`` None is the newest version.

        Raises:
            FeatureStoreError: One of the commits replaced all rows, or vacuum has deleted what it
                added since it lies in compacted files: read the whole view.
        """
        definition = define(self._features, view)
        last = self.version(view) if upto is None else upto
        folder = self.path(view)
        files = delta_log.changed_files(folder, after, last)
        check_files(folder, files)
        return (batch for file in files for batch in read_batches(folder, file, definition.schema))

    def watermark(self, view: str, version: int | None = None, generation: str = "") -> int | None:
        """Return up to which created time (µs) the view is complete with rows of the generation.

        None before any commit, or where the rows are of another generation.
        """
        table = self._open(view, version)
        mark = None if table is None else delta_log.mark_of(table)
        if mark is None or mark.generation != delta_log.generation_token(generation):
            return None
        if version is None:
            self._is_remade(view)
            self._followed[view] = generation
        return mark.watermark_us

    def generation(self, view: str, version: int | None = None) -> str:
        """Return what stands for the code that made the stored rows, "" where there is none."""
        table = self._open(view, version)
        token = 0 if table is None else delta_log.mark_of(table).generation
        return f"{token:014x}" if token else ""

    def version(self, view: str) -> int:
        """Return the newest version of a view's table, −1 when there is no table yet."""
        table = self._open(view)
        return -1 if table is None else int(table.version())

    def version_at(self, view: str, moment: datetime) -> int:
        """Return the version that was the newest at a moment, −1 when there was no table yet."""
        newest = self.version(view)
        return delta_log.version_at(self.path(view), newest, to_us(moment))

    def table_id(self, view: str) -> str:
        """Return the id of a view's Delta table, "" when there is none."""
        table = self._open(view)
        return "" if table is None else str(table.metadata().id)

    def stored_schema(self, view: str) -> pa.Schema | None:
        """Return the columns that a view's table has now, None when there is no table yet."""
        table = self._open(view)
        return None if table is None else delta_log.stored_schema(table)

    def compact(self, view: str) -> int:
        """Bring the tail and small files into sorted files of buckets; return the table's version.

        The rows stay as they are. Others may append meanwhile.
        """
        definition = define(self._features, view)
        return compaction.compact(self.path(view), [*definition.keys])

    def vacuum(
        self, view: str, *, retention: timedelta = timedelta(days=7), dry_run: bool = False
    ) -> list[str]:
        """Delete files that no version needs which is pinned, the newest, or not older than that.

        Returns the files' paths relative to the table's folder. A version that a training manifest
        pins stays readable; another one that was replaced before ``now − retention`` does not.

        Args:
            view: The view's name.
            retention: How long versions and unfinished writes stay. Choose it longer than any
                running job.
            dry_run: Only say which files they are.
        """
        from mlops_ray.features.manifest import pinned_versions, pinning

        with pinning(self.root):
            keep = pinned_versions(self.root, view, self.table_id(view))
            return compaction.vacuum(self.path(view), keep, retention, dry_run)

    def _commit(
        self,
        definition: ViewDefinition,
        table: Any,
        files: Sequence[WrittenFile],
        watermark_us: int,
        generation: str,
    ) -> int:
        view, folder = definition.name, self.path(definition.name)
        token = delta_log.generation_token(generation)
        if table is None:
            buckets = self._features.offline.buckets
            mark = Mark(watermark_us, token)
            delta_log.create(folder, definition.schema, files, mark, buckets)
            version, self._births[view] = 0, delta_log.birth(folder)
        else:
            same = self._mark(view, table).generation == token
            replaced = [] if same else delta_log.files_of(table)
            version = delta_log.commit(table, folder, files, replaced, Mark(watermark_us, token))
        self._followed[view] = generation
        self._marks[view] = version, Mark(watermark_us, token)
        return version

    def _stored(self, view: str, table: Any, generation: str) -> int | None:
        """Return the watermark from which rows of the generation go on."""
        if table is None:
            return None
        mark = self._mark(view, table)
        if mark.generation == delta_log.generation_token(generation):
            return mark.watermark_us
        if self._followed.get(view) == generation:
            raise FeatureStoreError(
                "rows that other code made took the place of those that these go on from",
                where=str(self.path(view)),
                why="another process runs with a newer or older state of the code",
                fix="end the one whose code is out of date and run the other again",
            )
        return None

    def _mark(self, view: str, table: Any) -> Mark:
        """Return a table's mark, without asking it where this store made its last commit."""
        version, mark = self._marks.get(view, (None, None))
        if mark is None or version != table.version():
            mark = delta_log.mark_of(table)
            self._marks[view] = int(table.version()), mark
        return mark

    def _table_to_write(self, definition: ViewDefinition) -> Any:
        """Return the newest version of a table, with all of the definition's columns."""
        view = definition.name
        if self._is_remade(view):
            raise FeatureStoreError(
                "the table that these rows go on from was removed meanwhile",
                where=str(self.path(view)),
                fix="make the rows anew from the stored watermark on",
            )
        # A table that cannot be updated is opened anew by the next attempt.
        table = self._writing.pop(view, None)
        if table is None:
            table = self._open(view)
        else:
            table.update_incremental()
        if table is None:
            return None
        self._writing[view] = table
        new = self._check(definition, table)
        if new:
            delta_log.add_columns(table, self.path(view), new)
        return table

    def _is_remade(self, view: str) -> bool:
        """Say whether another table lies where this store read or wrote one; it is forgotten then."""
        known, now = self._births.get(view), delta_log.birth(self.path(view))
        self._births[view] = now
        if known is None or known == now:
            return False
        for held in (self._writing, self._marks, self._followed):
            held.pop(view, None)
        return True

    def _check(self, definition: ViewDefinition, table: Any) -> list[pa.Field]:
        where = f"features.views.{definition.name}"
        return delta_log.check_types(table, definition.schema, where)

    def _buckets(self, table: Any) -> int:
        return self._features.offline.buckets if table is None else delta_log.bucket_count(table)

    def _open(self, view: str, version: int | None = None) -> Any:
        return delta_log.open_table(self.path(view), version)


def _span(since: datetime | None, until: datetime | None) -> tuple[int | None, int | None]:
    return (
        None if since is None else to_us(since),
        None if until is None else to_us(until),
    )


def _try(once: Callable[[], int], attempts: int) -> int:
    for _ in range(attempts - 1):
        try:
            return once()
        except ConcurrentCommitError:
            continue
    return once()
