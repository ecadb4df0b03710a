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
    watermark_us: int,
    buckets: Callable[[], int],
) -> list[WrittenFile]:
    """Write rows above the watermark: few to one file of the tail, many to files of buckets.

    Args:
        folder: The table's folder.
        definition: The view.
        tables: Its rows; of an iterator no more than a million are held at a time.
        stored_us: The watermark: rows created up to then are left out.
        watermark_us: The watermark that is to be committed with them.
        buckets: Tells how many buckets there are.

    Raises:
        FeatureStoreError: A row was created after ``watermark_us``.
    """
    files: list[WrittenFile] = []
    held = 0
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
        rows = _above(conform(table, definition.schema), stored_us)
        _refuse_above(pc.max(rows[CREATED_TIME].cast(pa.int64())).as_py(), watermark_us, folder)
        buffer.append(rows)
        held += rows.num_rows
        if held >= _BUFFER_ROWS:
            flush(0)
            held = 0
    flush(TAIL_ROWS if not files else 0)
    return files


def _above(rows: pa.Table, stored_us: int | None) -> pa.Table:
    if stored_us is None:
        return rows
    return rows.filter(pc.greater(rows[CREATED_TIME], pa.scalar(stored_us, INSTANT)))


def _refuse_above(created_us: int | None, watermark_us: int, where: Path) -> None:
    """The next append would store such a row a second time."""
    if created_us is not None and created_us > watermark_us:
        raise FeatureStoreError(
            f"a row was created {created_us - watermark_us} µs after the watermark",
            where=str(where),
            why="the watermark says up to which created time the view is complete",
            fix="commit these rows with a later watermark",
        )


def refuse_outside(
    files: Sequence[WrittenFile], stored_us: int | None, watermark_us: int, folder: Path
) -> None:
    """Make sure that all rows of the files were created above the one watermark, up to the other.

    Raises:
        FeatureStoreError: A file has another row: names it.
    """
    for file in files:
        if file.created_us is None:
            continue
        _refuse_above(file.created_us[1], watermark_us, folder / file.path)
        if stored_us is not None and file.created_us[0] <= stored_us:
            raise FeatureStoreError(
                "some of these rows are stored already",
                where=str(folder / file.path),
                why="another writer moved the watermark after they were made",
                fix="make them anew from the stored watermark on",
            )
