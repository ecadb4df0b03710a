"""What the replicas have logged since somebody last looked: the monitor's way to read the log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from mlops_ray.metadata.delta import LABEL_SCHEMA, Delta, prediction_schema
from mlops_ray.metadata.prediction_log.frames import Counts
from mlops_ray.metadata.prediction_log.layout import (
    BATCH,
    frames_after,
    open_segments,
    readers_folder,
    segments,
)

SHADOW = "shadow_"
READER_PATIENCE_S = 3 * 86_400.0
"""For how long files are kept for a reader that does not come back."""

_MOST_FRAMES = 512


def read_news(folder: Path, positions: Mapping[str, int]) -> Delta | None:
    """Return what stands in the log beyond ``positions``, None where there is nothing.

    Scored batches are no news: they say nothing of what is asked now. The delta's positions are those
    to ask with the next time. Whoever keeps them together with what it made of the deltas counts
    each row once, whatever dies in between. After a long absence it takes several calls, until None
    comes.

    Args:
        folder: The project's prediction log.
        positions: By replica, the sequence number up to which all is known.
    """
    reached: dict[str, int] = {}
    counts: Counts = {}
    predictions: list[pa.Table] = []
    labels: list[pa.Table] = []
    live = {n: files for n, files in segments(folder).items() if not n.startswith(BATCH)}
    opened = open_segments(live)
    try:
        for replica, files in opened.items():
            for frame in frames_after(files, positions.get(replica, 0)):
                if len(predictions) + len(labels) >= _MOST_FRAMES:
                    break
                reached[replica] = frame.sequence
                tables = (frame.predictions, frame.others)
                predictions.extend(_slim(table) for table in tables if table is not None)
                if frame.labels is not None:
                    labels.append(frame.labels.select(LABEL_SCHEMA.names))
                _add(counts, frame.counts)
    finally:
        for files in opened.values():
            for _, file in files:
                file.close()
    if not reached:
        return None
    return Delta(
        buckets=counts,
        predictions=_joined(predictions, prediction_schema()),
        labels=_joined(labels, LABEL_SCHEMA),
        positions=reached,
    )


def keep_from(folder: Path, reader: str, positions: Mapping[str, int]) -> None:
    """Ask that nothing beyond ``positions`` be removed; to be said again within ``READER_PATIENCE_S``.

    Where the log cannot be written to, nothing of it is removed either.
    """
    path = readers_folder(folder) / f"{reader}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(dict(positions)))
    os.replace(draft, path)


def wanted_from(folder: Path) -> list[Mapping[str, int]]:
    """Return the positions of all readers that have been heard of lately."""
    found = []
    for path in sorted(readers_folder(folder).glob("*.json")):
        if time.time() - path.stat().st_mtime > READER_PATIENCE_S:
            path.unlink(missing_ok=True)
        else:
            found.append(json.loads(path.read_text()))
    return found


def _slim(table: pa.Table) -> pa.Table:
    shadows = [name for name in table.column_names if name.startswith(SHADOW)]
    return table.select([*prediction_schema().names, *shadows])


def _joined(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *tables], promote_options="default")


def _add(total: Counts, more: Counts) -> None:
    for digest, days in more.items():
        known = total.setdefault(digest, {})
        for day, profile in days.items():
            known[day] = known[day].merge(profile) if day in known else profile
