"""Delta tables as the offline store keeps them: opening, the files of a version, single commits."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import from_us
from mlops_ray.features.definitions import CREATED_TIME, EVENT_TIME
from mlops_ray.features.files import Range, WrittenFile

BUCKET = pa.field("bucket", pa.int32())

_WATERMARK = "mlops-ray-watermark"
_GENERATION = "mlops-ray-generation"
_BUCKETS = "mlops-ray-buckets"
_CONFIGURATION = {
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
}
_YEARS = (-62_135_596_800_000_000, 253_402_300_799_999_999)


class ConcurrentCommitError(FeatureStoreError):
    """Another writer was quicker; nothing was committed."""


@dataclass(frozen=True)
class Mark:
    """Up to which created time (µs) a table is complete, and the number of its generation."""

    watermark_us: int
    generation: int


def open_table(folder: Path, version: int | None = None) -> Any:
    """Return the table of a folder, at its newest version when None; None where there is none.

    Raises:
        FeatureStoreError: There is no such version.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    if version is not None and version < 0:
        raise FeatureStoreError(
            f"there is no version {version}", where=str(folder), fix="the first version is 0"
        )
    try:
        table = DeltaTable(str(folder), version=version) if folder.is_dir() else None
    except TableNotFoundError:
        table = None
    except DeltaError as error:
        raise FeatureStoreError(
            f"version {version} cannot be read",
            where=str(folder),
            why=str(error),
            fix="the newest version can be read by leaving the version out",
        ) from error
    if table is None and version is not None:
        raise FeatureStoreError(
            f"there is no version {version}",
            where=str(folder),
            why="the view has no table, or was declared differently then",
            fix="run the features workflow, or use the configuration of that version",
        )
    return table


def birth(folder: Path) -> tuple[int, int] | None:
    """Return what tells a table from another one in the same folder later, None for no table."""
    try:
        first = (folder / "_delta_log" / f"{0:020d}.json").stat()
    except FileNotFoundError:
        return None
    return first.st_ino, first.st_mtime_ns


def generation_token(generation: str) -> int:
    """Return the number that stands for a generation in a table; 0 for none."""
    if not generation:
        return 0
    return int.from_bytes(hashlib.blake2b(generation.encode(), digest_size=7).digest(), "big")


def mark_of(table: Any) -> Mark:
    """Return up to where a table is complete, and with rows of which generation."""
    watermark_us = table.transaction_version(_WATERMARK)
    return Mark(int(watermark_us), int(table.transaction_version(_GENERATION)))


def bucket_count(table: Any) -> int:
    """Return into how many buckets a table is cut."""
    return int(table.transaction_version(_BUCKETS))


def stored_schema(table: Any) -> pa.Schema:
    """Return the columns that a table has at its version, the bucket apart."""
    schema = pa.schema(table.schema().to_arrow())
    return pa.schema([field for field in schema if field.name != BUCKET.name])


def check_types(table: Any, wanted: pa.Schema, where: str) -> list[pa.Field]:
    """Return the fields that a table does not have yet.

    Raises:
        FeatureStoreError: The table has a column with another type than ``wanted``.
    """
    stored = {field.name: _plain(field.type) for field in stored_schema(table)}
    for field in wanted:
        if field.name in stored and stored[field.name] != field.type:
            raise FeatureStoreError(
                f"feature {field.name!r} is declared as {field.type}, "
                f"but its rows are stored as {stored[field.name]}",
                where=where,
                why="rows of both types would be in one table",
                fix="raise the view's version, so that its rows are made anew; or rename the feature",
            )
    return [field for field in wanted if field.name not in stored]


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type without Arrow's ways to lay the same values out."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return kind


def files_of(table: Any) -> list[WrittenFile]:
    """Return the files of a table's version, by bucket and then by when they were written."""
    actions = pa.table(table.get_add_actions(flatten=True))
    if not actions.num_rows:
        return []
    told = ("path", f"partition.{BUCKET.name}", "num_records", "size_bytes")
    columns = [
        *(actions[name].to_pylist() for name in told),
        *(_ranges(actions, name) for name in (EVENT_TIME, CREATED_TIME)),
    ]
    files = [WrittenFile(*values) for values in zip(*columns, strict=True)]
    return sorted(files, key=lambda file: (file.bucket, file.order))


def _ranges(actions: pa.Table, name: str) -> list[Range | None]:
    ends = [f"min.{name}", f"max.{name}"]
    if any(end not in actions.column_names for end in ends):
        return [None] * actions.num_rows
    low, high = (actions[end].cast(pa.int64()).to_pylist() for end in ends)
    return [None if a is None else (a, b) for a, b in zip(low, high, strict=True)]


def create(
    folder: Path,
    schema: pa.Schema,
    files: Sequence[WrittenFile],
    mark: Mark,
    buckets: int,
) -> None:
    """Make a table whose version 0 has these files.

    Raises:
        ConcurrentCommitError: Another writer made it first.
    """
    from deltalake import CommitProperties, Schema, Transaction
    from deltalake.exceptions import DeltaError
    from deltalake.transaction import create_table_with_add_actions

    folder.mkdir(parents=True, exist_ok=True)
    try:
        create_table_with_add_actions(
            str(folder),
            Schema.from_arrow(pa.schema([*schema, BUCKET])),
            [_add(file, True) for file in files],
            mode="error",
            partition_by=[BUCKET.name],
            configuration=_CONFIGURATION,
            commit_properties=CommitProperties(
                app_transactions=[
                    *_transactions(mark),
                    Transaction(_BUCKETS, buckets),
                ],
                max_commit_retries=0,
            ),
        )
    except DeltaError as error:
        if open_table(folder) is None:
            raise
        raise _lost(folder, error) from error


def commit(
    table: Any,
    folder: Path,
    added: Sequence[WrittenFile],
    removed: Sequence[WrittenFile] = (),
    mark: Mark | None = None,
) -> int:
    """Put files into a table and take others out, in one commit; return its version.

    Args:
        table: The table as it was when the files were chosen.
        folder: Its folder.
        added: Files to put in.
        removed: Files to take out.
        mark: The new watermark and generation; without, the rows are the same as before, in other
            files.

    Raises:
        ConcurrentCommitError: Another writer has committed since.
    """
    from deltalake import CommitProperties
    from deltalake.exceptions import CommitFailedError
    from deltalake.transaction import RemoveAction

    change, before = mark is not None, int(table.version())
    now_ms = time.time_ns() // 1_000_000
    actions: list[Any] = [
        RemoveAction(file.path, change, now_ms, file.size, {BUCKET.name: str(file.bucket)})
        for file in removed
    ]
    actions += [_add(file, change) for file in added]
    transactions = None if mark is None else _transactions(mark)
    # A second try by deltalake itself would not look at the watermark again.
    properties = CommitProperties(app_transactions=transactions, max_commit_retries=0)
    try:
        if actions:
            table.create_write_transaction(
                actions,
                "append",
                table.schema(),
                partition_by=[BUCKET.name],
                commit_properties=properties,
            )
        else:
            # Without an action deltalake would commit nothing, not even the watermark.
            table.alter.set_table_properties(_CONFIGURATION, commit_properties=properties)
    except CommitFailedError as error:
        raise _lost(folder, error) from error
    return before + 1


def add_columns(table: Any, folder: Path, fields: Sequence[pa.Field]) -> None:
    """Add columns to a table; rows that are there have nulls in them.

    Raises:
        ConcurrentCommitError: Another writer has committed meanwhile.
    """
    from deltalake import CommitProperties, Field
    from deltalake.exceptions import DeltaError

    try:
        table.alter.add_columns(
            [Field.from_arrow(field) for field in fields],
            commit_properties=CommitProperties(max_commit_retries=0),
        )
    except DeltaError as error:
        raise _lost(folder, error) from error


def changed_files(folder: Path, after: int, upto: int) -> list[WrittenFile]:
    """Return the files that the commits in (after, upto] brought new rows with, oldest first.

    Raises:
        FeatureStoreError: One of these commits took rows away, or its record is not there.
    """
    files: list[WrittenFile] = []
    for version in range(after + 1, upto + 1):
        for action in _actions(folder, version):
            if action.get("remove", {}).get("dataChange"):
                raise FeatureStoreError(
                    f"version {version} replaced all rows",
                    where=str(folder),
                    why=f"what changed since version {after} is everything",
                    fix="read the whole view",
                )
            if action.get("add", {}).get("dataChange"):
                files.append(_file_of(action["add"]))
    return files


def added_files(folder: Path, after: int, upto: int) -> list[WrittenFile]:
    """Return the files that the commits in (after, upto] put in, with new rows or old ones."""
    versions = range(after + 1, upto + 1)
    actions = (action for version in versions for action in _actions(folder, version))
    return [_file_of(action["add"]) for action in actions if "add" in action]


def _actions(folder: Path, version: int) -> Iterator[dict[str, Any]]:
    path = folder / "_delta_log" / f"{version:020d}.json"
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise FeatureStoreError(
            f"there is no record of version {version}", where=str(path), fix="read the whole view"
        ) from error
    for line in text.splitlines():
        if line.strip():
            yield json.loads(line)


def _file_of(add: dict[str, Any]) -> WrittenFile:
    statistics = json.loads(add["stats"])
    bucket = int(add["partitionValues"][BUCKET.name])
    return WrittenFile(add["path"], bucket, statistics["numRecords"], add["size"], None, None)


def _transactions(mark: Mark) -> list[Any]:
    from deltalake import Transaction

    return [Transaction(_WATERMARK, mark.watermark_us), Transaction(_GENERATION, mark.generation)]


def _add(file: WrittenFile, change: bool) -> Any:
    from deltalake.transaction import AddAction

    now_ms = time.time_ns() // 1_000_000
    return AddAction(
        file.path, file.size, {BUCKET.name: str(file.bucket)}, now_ms, change, _statistics(file)
    )


def _statistics(file: WrittenFile) -> str:
    ranges = {EVENT_TIME: file.event_us, CREATED_TIME: file.created_us}
    told = {
        name: (_text(ends[0]), _text(ends[1]))
        for name, ends in ranges.items()
        if ends is not None and _YEARS[0] <= ends[0] and ends[1] <= _YEARS[1]
    }
    return json.dumps(
        {
            "numRecords": file.rows,
            "minValues": {name: ends[0] for name, ends in told.items()},
            "maxValues": {name: ends[1] for name, ends in told.items()},
            "nullCount": {},
        }
    )


def _text(instant_us: int) -> str:
    moment = from_us(instant_us).astimezone(UTC)
    return f"{moment.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def _lost(folder: Path, error: Exception) -> ConcurrentCommitError:
    return ConcurrentCommitError(
        "another writer committed to this view at the same time",
        where=str(folder),
        why=str(error),
        fix="run it again: it goes on from the other's watermark",
    )


def version_at(folder: Path, newest: int, moment_us: int) -> int:
    """Return the last version up to ``newest`` that was committed by a moment, −1 for none."""
    low, high = -1, newest
    while low < high:
        middle = (low + high + 1) // 2
        if _committed_us(folder, middle) <= moment_us:
            low = middle
        else:
            high = middle - 1
    return low


def _committed_us(folder: Path, version: int) -> int:
    for action in _actions(folder, version):
        if "commitInfo" in action:
            return int(action["commitInfo"]["timestamp"]) * 1000
    raise FeatureStoreError(f"version {version} does not say when it was made", where=str(folder))
