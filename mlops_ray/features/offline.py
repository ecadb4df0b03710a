"""The offline store: the whole history of every view, in one Delta Lake table each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import INSTANT
from mlops_ray.features.definitions import CREATED_TIME, EVENT_TIME, ViewDefinition, define

_WATERMARK = "mlops-ray-watermark"
_DIGEST_LETTERS = 16
_ATTEMPTS = 5


class _ConcurrentCommitError(FeatureStoreError):
    """Another writer was quicker; nothing was written."""


class OfflineStore:
    """Append-only tables of feature rows, readable at any of their versions.

    A view lies in ``<root>/<view>/<digest of its definition>``. Its **watermark** is the moment, in
    µs since 1970, up to which all rows by created time are stored. It is committed with the rows,
    so a row is never stored twice: what lies at or below the watermark is not appended again.
    """

    def __init__(self, root: Path, features: Features) -> None:
        self._root = root
        self._features = features
        self._writing: dict[str, Any] = {}

    def path(self, view: str) -> Path:
        """Return the folder of a view's table; it may not be there yet."""
        definition = define(self._features, view)
        return self._root / view / definition.digest[:_DIGEST_LETTERS]

    def append(self, view: str, rows: pa.Table | Iterable[pa.Table], watermark_us: int) -> int:
        """Append rows in one commit that also moves the watermark; return the table's version.

        Rows whose created time is not above the stored watermark are dropped: they are stored.

        Args:
            view: The view's name.
            rows: A table of the view's schema, a list of them, or an iterator to stream.
            watermark_us: Up to where, by created time, the view is complete with these rows.

        Raises:
            FeatureStoreError: Another writer kept committing to this view at the same time; nothing
                was written. An iterator cannot be read twice, so it has one attempt.
        """
        definition = define(self._features, view)
        tables = [rows] if isinstance(rows, pa.Table) else rows
        attempts = _ATTEMPTS if isinstance(tables, Sequence) else 1
        for _ in range(attempts - 1):
            try:
                return self._append_once(definition, tables, watermark_us)
            except _ConcurrentCommitError:
                continue
        return self._append_once(definition, tables, watermark_us)

    def _append_once(
        self, definition: ViewDefinition, tables: Iterable[pa.Table], watermark_us: int
    ) -> int:
        from deltalake import CommitProperties, Transaction, write_deltalake
        from deltalake.exceptions import CommitFailedError

        view = definition.name
        table = self._open_for_writing(view)
        stored = None if table is None else table.transaction_version(_WATERMARK)
        if table is not None and stored is not None and stored >= watermark_us:
            return int(table.version())
        transactions = [Transaction(_WATERMARK, watermark_us)]
        try:
            write_deltalake(
                table if table is not None else self._new_folder(view),
                pa.RecordBatchReader.from_batches(
                    definition.schema, _batches(tables, definition, stored)
                ),
                mode="append",
                # A second try by deltalake itself would not look at the watermark again.
                commit_properties=CommitProperties(
                    app_transactions=transactions, max_commit_retries=0
                ),
            )
        except CommitFailedError as error:
            raise _ConcurrentCommitError(
                "another writer appended to this view at the same time",
                where=str(self.path(view)),
                why=str(error),
                fix="run it again: it goes on from the other's watermark",
            ) from error
        return int(table.version()) if table is not None else self.version(view)

    def read(
        self,
        view: str,
        version: int | None = None,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Return the rows of a view with ``since`` ≤ event time ≤ ``until``, in no fixed order.

        Args:
            view: The view's name.
            version: A version of its table, the newest when None; −1 stands for no table yet.
            since: Earliest event time, if any.
            until: Latest event time, if any.
            columns: Which columns, all when None.

        Raises:
            FeatureStoreError: There is no such version.
        """
        definition = define(self._features, view)
        table = None if version == -1 else self._open(view, version)
        if table is None:
            empty = definition.schema.empty_table()
            return empty if columns is None else empty.select(list(columns))
        # deltalake's own filesystem can abort the interpreter at exit; Arrow's does not.
        from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

        filesystem = SubTreeFileSystem(str(self.path(view)), LocalFileSystem())
        dataset = table.to_pyarrow_dataset(filesystem=filesystem)
        names = list(columns) if columns is not None else definition.schema.names
        found = dataset.to_table(columns=names, filter=_between(since, until))
        fields = [definition.schema.field(name) for name in names]
        return found.cast(pa.schema(fields))

    def watermark(self, view: str, version: int | None = None) -> int | None:
        """Return up to which created time (µs) the view is complete, None before any commit."""
        table = self._open(view, version)
        return None if table is None else table.transaction_version(_WATERMARK)

    def version(self, view: str) -> int:
        """Return the newest version of a view's table, −1 when there is no table yet."""
        table = self._open(view)
        return -1 if table is None else int(table.version())

    def _open_for_writing(self, view: str) -> Any:
        """Return the newest version of a table, read on from where the last append left it."""
        table = self._writing.get(view)
        if table is None:
            table = self._writing[view] = self._open(view)
        else:
            table.update_incremental()
        return table

    def _open(self, view: str, version: int | None = None) -> Any:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        path = self.path(view)
        try:
            return DeltaTable(str(path), version=version) if path.is_dir() else _no(version, path)
        except TableNotFoundError:
            return _no(version, path)
        except DeltaError as error:
            raise FeatureStoreError(
                f"version {version} of view {view!r} cannot be read",
                where=str(path),
                why=str(error),
                fix="the newest version can be read by leaving the version out",
            ) from error

    def _new_folder(self, view: str) -> str:
        path = self.path(view)
        path.mkdir(parents=True, exist_ok=True)
        return str(path)


def _no(version: int | None, path: Path) -> None:
    if version is not None:
        raise FeatureStoreError(
            f"there is no version {version}",
            where=str(path),
            why="the view has no table, or was declared differently then",
            fix="run the features workflow, or use the configuration of that version",
        )


def _batches(
    tables: Iterable[pa.Table], definition: ViewDefinition, stored_us: int | None
) -> Iterator[pa.RecordBatch]:
    for table in tables:
        whole = table.select(definition.schema.names).cast(definition.schema)
        if stored_us is not None:
            newer = pc.greater(whole[CREATED_TIME], pa.scalar(stored_us, INSTANT))
            whole = whole.filter(newer)
        yield from whole.to_batches()


def _between(since: datetime | None, until: datetime | None) -> Any:
    condition = None
    if since is not None:
        condition = pc.field(EVENT_TIME) >= pa.scalar(since, INSTANT)
    if until is not None:
        upper = pc.field(EVENT_TIME) <= pa.scalar(until, INSTANT)
        condition = upper if condition is None else condition & upper
    return condition
