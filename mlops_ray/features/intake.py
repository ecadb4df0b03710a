"""Rows on their way into a view's table: those that are new, as files that no commit knows yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import INSTANT
from mlops_ray.features.definitions import CREATED_TIME, ViewDefinition
from mlops_ray.features.files import TAIL, TAIL_ROWS, WrittenFile, by_bucket, conform, write_file

_BUFFER_ROWS = 1_000_000


def write_rows(
    folder: Path,
    definition: ViewDefinition,
    tables: Iterable[pa.Table],
    stored_us: int | None,
    buckets: Callable[[], int],
) -> list[WrittenFile]:
    """Write rows above the watermark: few to one file of the tail, many to files of buckets.

    Args:
        folder: The table's folder.
        definition: The view.
        tables: Its rows; of an iterator no more than a million are held at a time.
        stored_us: The watermark: rows created up to then are left out.
        buckets: Tells how many buckets there are.
    """
    files: list[WrittenFile] = []
    buffer: list[pa.Table] = []
    keys = [*definition.keys]

    def flush(most: int) -> None:
        rows = pa.concat_tables([definition.schema.empty_table(), *buffer])
        buffer.clear()
        if not rows.num_rows:
            return
        parts = {TAIL: rows} if rows.num_rows <= most else by_bucket(rows, keys, buckets())
        files.extend(write_file(folder, bucket, part, keys) for bucket, part in parts.items())

    for table in tables:
        buffer.append(_above(conform(table, definition.schema), stored_us))
        if sum(rows.num_rows for rows in buffer) >= _BUFFER_ROWS:
            flush(0)
    flush(TAIL_ROWS if not files else 0)
    return files


def _above(rows: pa.Table, stored_us: int | None) -> pa.Table:
    if stored_us is None:
        return rows
    return rows.filter(pc.greater(rows[CREATED_TIME], pa.scalar(stored_us, INSTANT)))


def refuse_stored(files: Sequence[WrittenFile], stored_us: int | None, folder: Path) -> None:
    """Make sure that none of the files has a row at or below the watermark.

    Raises:
        FeatureStoreError: One has: names it.
    """
    if stored_us is None:
        return
    for file in files:
        if file.created_us is not None and file.created_us[0] <= stored_us:
            raise FeatureStoreError(
                "some of these rows are stored already",
                where=str(folder / file.path),
                why="another writer moved the watermark after they were made",
                fix="make them anew from the stored watermark on",
            )
