"""From the offline store to the online one: all of a view, or what was committed since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pyarrow as pa

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.files import read_batches
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import Cursor, OnlineStore


def materialize_view(
    offline: OfflineStore,
    online: OnlineStore,
    view: str,
    generation: str = "",
    *,
    full: bool = False,
) -> int:
    """Bring a view online up to the newest version of its offline table; return the rows written.

    What was committed after the store's cursor is taken, by the number of its commit: so a row
    arrives however late it is. Where the cursor is of another table, there is none, or all rows were
    replaced since, the view is filled anew and switched at the end. The cursor moves last: after a
    kill, running it again leaves what an undisturbed run leaves.

    Args:
        offline: Where the rows are.
        online: Where the newest of each entity go, open for writing.
        view: The view's name.
        generation: Of the rows: what ``code_digest_of`` says.
        full: Fill the view anew in any case.

    Raises:
        FeatureStoreError: One of the stores cannot be read or written.
    """
    upto = offline.version(view)
    if upto < 0:
        return 0
    watermark_us = offline.watermark(view, upto, generation)
    target = Cursor(offline.table_id(view), upto, watermark_us, generation)
    cursor = online.cursor(view)
    known = cursor is not None and cursor.table == target.table and cursor.version <= upto
    if cursor is not None and known and not full:
        with suppress(_ChangesLostError):
            changes = _changes(offline, view, cursor.version, upto)
            written = sum(online.write(view, rows) for rows in changes)
            if cursor != target:
                online.move_cursor(view, target)
            online.flush()
            return written
    written = online.replace(view, _rows(offline, view, upto), target)
    online.flush()
    return written


class _ChangesLostError(Exception):
    """The commits do not tell any more what changed: only all rows do."""


def _changes(offline: OfflineStore, view: str, after: int, upto: int) -> Iterator[pa.Table]:
    try:
        yield from offline.changes(view, after, upto)
    except FeatureStoreError as error:
        # One of them replaced all rows, or a vacuum took files that a compaction had replaced.
        raise _ChangesLostError from error


def _rows(offline: OfflineStore, view: str, version: int) -> Iterator[pa.Table]:
    """Yield the rows of a version file by file; of rows with equal times the later written last."""
    schema = offline.read(view, -1).schema
    for file in sorted(offline.files(view, version), key=lambda file: file.order):
        yield from read_batches(offline.path(view), file, schema)
