"""From the offline store to the online one: all of a view, or what was committed since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pyarrow as pa

from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.files import read_batches
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import Cursor, OnlineStore


def materialize_view(
    offline: OfflineStore,
    online: OnlineStore,
    view: str,
    generation: str | None = None,
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
        generation: Of the rows: what ``code_digest_of`` says. None takes whichever is stored.
        full: Fill the view anew in any case.

    Raises:
        FeatureStoreError: One of the stores cannot be read or written, or the stored rows are of
            another generation.
    """
    upto = offline.version(view)
    if upto < 0:
        return 0
    target = _target(offline, view, upto, generation)
    cursor = online.cursor(view)
    known = cursor is not None and cursor.table == target.table and cursor.version <= upto
    if cursor is not None and known and not full:
        with suppress(_ChangesLostError):
            changes = _changes(offline, view, cursor.version, upto)
            written = sum(online.write(view, rows) for rows in changes)
            target = replace(target, filling=cursor.filling)
            if cursor != target and not online.move_cursor(view, target):
                # Another process filled the view anew meanwhile, perhaps without these rows.
                return written + materialize_view(offline, online, view, generation)
            online.flush()
            return written
    written = online.replace(view, _rows(offline, view, upto), target)
    online.flush()
    return written


def _target(offline: OfflineStore, view: str, upto: int, generation: str | None) -> Cursor:
    table = offline.table_id(view)
    if generation is None:
        return Cursor(table, upto, None, offline.generation(view, upto))
    watermark_us = offline.watermark(view, upto, generation)
    if watermark_us is None:
        raise FeatureStoreError(
            f"the rows of view {view!r} were not made by its present code",
            where=str(offline.path(view)),
            fix="run the features workflow: it makes them anew",
        )
    return Cursor(table, upto, watermark_us, generation)


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
