"""From the files of the replicas to Delta tables: each row once, whoever does it and whenever it dies.

The sequence numbers up to which the frames of the replicas are in a table are committed together with
the rows, by an app transaction of Delta; see ``prediction_log.tables``.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.errors import ServingError
from mlops_ray.metadata.files import sync
from mlops_ray.metadata.prediction_log.fitting import Fitting
from mlops_ray.metadata.prediction_log.frames import Frame, read_frames
from mlops_ray.metadata.prediction_log.layout import (
    BATCH,
    DAY,
    DRAFT,
    KINDS,
    LABELS,
    PREDICTIONS,
    Kind,
    Segment,
    frames_after,
    replica_folder,
    segments,
    table_folder,
    try_lock,
    unread_segments,
)
from mlops_ray.metadata.prediction_log.news import wanted_from
from mlops_ray.metadata.prediction_log.tables import (
    TRANSACTION,
    open_table,
    read_positions,
    remove_old_positions,
    write_positions,
)

_BATCH_BYTES = 64 << 20
_ATTEMPTS = 5
_IDLE_S = 3600.0
_PATIENCE_S, _POLL_S = 300.0, 0.5
_VACUUM_EVERY_S = 6 * 3600.0
_READABLE_FOR = timedelta(days=1)
"""How long files stay that a table has let go of: somebody may be reading an older version."""

_SCHEMAS: Mapping[Kind, pa.Schema] = {"predictions": PREDICTIONS, "labels": LABELS}


@dataclass
class Compacted:
    """What a compaction did: rows by table, files removed."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    files_removed: int = 0
    days_removed: int = 0


def compact(
    folder: Path, keep: timedelta | None = None, now: datetime | None = None
) -> Compacted | None:
    """Put what the replicas have written into the Delta tables, and remove what is not needed.

    It takes what replicas left behind that are gone, and what those that live have written so far.
    Files of replicas go when all of their rows are in the tables and the readers have passed them.
    Days that ended more than ``keep`` ago leave the tables; their files go a day later.

    Returns:
        What was done, None where another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compaction.lock").open("ab") as lock:
        if not try_lock(lock):
            return None
        done = Compacted()
        found = segments(folder)
        reached: dict[Kind, dict[str, int]] = {}
        for kind in KINDS:
            reached[kind] = _append_all(folder, kind, found, done)
        _remove_segments(folder, found, reached, done)
        if keep is not None:
            cutoff = ((now or datetime.now(UTC)) - keep).date()
            for kind in KINDS:
                _remove_days(folder, kind, cutoff.isoformat(), done)
        return done


def maintain(folder: Path, keep: timedelta | None = None) -> tuple[Compacted, int]:
    """Compact, waiting for another compaction to end, and merge the small files of past days.

    Returns what was compacted, and how many files were merged.

    Raises:
        ServingError: Another process compacts and does not come to an end.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while (done := compact(folder, keep)) is None:
        if time.monotonic() > deadline_s:
            raise ServingError(
                "another process compacts the prediction log",
                where=str(folder),
                fix="wait for its end, and run it again",
            )
        time.sleep(_POLL_S)
    return done, optimize(folder)


def optimize(folder: Path) -> int:
    """Merge the small files of each day that is over; return how many files went."""
    from deltalake import WriterProperties

    removed = 0
    today = datetime.now(UTC).date().isoformat()
    for kind in KINDS:
        table = open_table(folder, kind)
        if table is not None:
            told = table.optimize.compact(
                partition_filters=[(DAY.name, "<", today)],
                writer_properties=WriterProperties(compression="ZSTD"),
            )
            removed += int(told["numFilesRemoved"])
            _sync_commit(table_folder(folder, kind), table.version())
            _vacuum(table)
    return removed


@dataclass
class _Batch:
    """Frames of several replicas that go into a table in one commit."""

    rows: list[pa.Table] = field(default_factory=list)
    reached: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


def _append_all(
    folder: Path, kind: Kind, found: Mapping[str, list[Segment]], done: Compacted
) -> dict[str, int]:
    """Bring a table up to the end of the files; return up to where that is, by replica."""
    from deltalake.exceptions import CommitFailedError

    for attempt in range(1, _ATTEMPTS + 1):
        table = _ensure_table(folder, kind)
        known = read_positions(folder, kind, table)
        reached = {replica: known.get(replica, 0) for replica in found}
        try:
            for batch in _batches(kind, found, reached):
                if batch.rows:
                    done.rows[kind] += _append(table, folder, kind, batch)
                reached |= batch.reached
            return reached
        except CommitFailedError:
            # Somebody else has committed, who may have appended the same: look again.
            if attempt == _ATTEMPTS:
                raise
    raise AssertionError("not reached")


def _batches(
    kind: Kind, found: Mapping[str, list[Segment]], reached: Mapping[str, int]
) -> Iterator[_Batch]:
    batch = _Batch()
    for replica, files in found.items():
        for frame in frames_after(files, reached[replica]):
            table = _rows_of(frame, kind)
            batch.reached[replica] = frame.sequence
            if table is not None:
                batch.rows.append(table)
                batch.bytes += table.nbytes
            if batch.bytes >= _BATCH_BYTES:
                yield batch
                batch = _Batch()
    yield batch


def _rows_of(frame: Frame, kind: Kind) -> pa.Table | None:
    return frame.predictions if kind == "predictions" else frame.labels


def _append(table: Any, folder: Path, kind: Kind, batch: _Batch) -> int:
    from deltalake import CommitProperties, Transaction, WriterProperties, write_deltalake

    fitting = Fitting(pa.schema(table.schema().to_arrow()))
    fitted = [fitting.fit(rows) for rows in batch.rows]
    rows = pa.concat_tables(fitted, promote_options="permissive")
    rows = rows.append_column(DAY, pc.cast(rows["received"], DAY.type))
    number = write_positions(folder, kind, table, batch.reached)
    write_deltalake(
        table,
        rows,
        mode="append",
        schema_mode="merge",
        partition_by=[DAY.name],
        writer_properties=WriterProperties(compression="ZSTD"),
        commit_properties=CommitProperties(
            app_transactions=[Transaction(TRANSACTION, number)],
            # A second try by deltalake itself would not look at the transactions again.
            max_commit_retries=0,
        ),
    )
    _sync_commit(table_folder(folder, kind), table.version())
    remove_old_positions(folder, kind, table)
    return int(rows.num_rows)


def _ensure_table(folder: Path, kind: Kind) -> Any:
    from deltalake import DeltaTable, Schema

    table = open_table(folder, kind)
    if table is None:
        path = table_folder(folder, kind)
        path.mkdir(parents=True, exist_ok=True)
        schema = Schema.from_arrow(pa.schema([*_SCHEMAS[kind], DAY]))
        table = DeltaTable.create(str(path), schema, mode="ignore", partition_by=[DAY.name])
    return table


def _remove_segments(
    folder: Path,
    found: Mapping[str, list[Segment]],
    reached: Mapping[Kind, Mapping[str, int]],
    done: Compacted,
) -> None:
    readers = wanted_from(folder)
    with unread_segments(folder) as alone:
        if alone:
            _remove_passed(folder, found, reached, readers, done)


def _remove_passed(
    folder: Path,
    found: Mapping[str, list[Segment]],
    reached: Mapping[Kind, Mapping[str, int]],
    readers: Sequence[Mapping[str, int]],
    done: Compacted,
) -> None:
    for replica, files in found.items():
        passed = min(reached[kind][replica] for kind in KINDS)
        if not replica.startswith(BATCH):
            passed = min([passed, *(positions.get(replica, 0) for positions in readers)])
        for segment in files:
            # Where locks do not reach, another compaction may have been quicker.
            with contextlib.suppress(FileNotFoundError), segment.path.open("rb") as file:
                if try_lock(file) and next(read_frames(file, passed), None) is None:
                    segment.path.unlink()
                    done.files_removed += 1
        if not files:
            _remove_folder(replica_folder(folder, replica))


def _remove_folder(folder: Path) -> None:
    """Remove the folder of a replica that has had no files for a while."""
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime > _IDLE_S:
            (folder / DRAFT).unlink(missing_ok=True)
            folder.rmdir()


def _remove_days(folder: Path, kind: Kind, cutoff: str, done: Compacted) -> None:
    table = open_table(folder, kind)
    if table is None:
        return
    old = [day for day in table.partitions() if day[DAY.name] < cutoff]
    if old:
        table.delete(f"{DAY.name} < '{cutoff}'")
        _sync_commit(table_folder(folder, kind), table.version())
        done.days_removed += len(old)
    stamp = table_folder(folder, kind) / "_vacuumed"
    if not stamp.exists() or time.time() - stamp.stat().st_mtime > _VACUUM_EVERY_S:
        _vacuum(table)
        stamp.touch()


def _vacuum(table: Any) -> None:
    hours = int(_READABLE_FOR.total_seconds() // 3600)
    table.vacuum(retention_hours=hours, dry_run=False, enforce_retention_duration=False)


def _sync_commit(folder: Path, version: int) -> None:
    """Make a commit survive a crash of the machine: deltalake leaves its files to the kernel."""
    log = folder / "_delta_log"
    record = log / f"{version:020d}.json"
    folders = {log, folder}
    for line in record.read_text().splitlines():
        action = json.loads(line)
        if "add" in action:
            path = folder / unquote(action["add"]["path"])
            sync(path)
            folders.add(path.parent)
    sync(record)
    for path in folders:
        sync(path)
