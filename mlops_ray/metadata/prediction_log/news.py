"""What the replicas have logged since somebody last looked: the monitor's way to read the log."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.metadata.delta import LABEL_SCHEMA, Delta, prediction_schema
from mlops_ray.metadata.files import write_whole
from mlops_ray.metadata.prediction_log.frames import Counts
from mlops_ray.metadata.prediction_log.layout import (
    BATCH,
    SHADOW,
    frames_after,
    kept_segments,
    readers_folder,
)

READER_PATIENCE_S = 3 * 86_400.0
"""For how long files are kept for a reader that does not come back."""

_MOST_FRAMES = 512


def read_news(folder: Path, positions: Mapping[str, int]) -> Delta | None:
    """Return what stands in the log beyond ``positions``, None where there is nothing.

    Scored batches are no news: they say nothing of what is asked now; nor is what other models than the
    endpoint's own have answered. The delta's positions are those
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
    frames, more = 0, False
    with kept_segments(folder) as found:
        live = {name: files for name, files in found.items() if not name.startswith(BATCH)}
        for replica, files in live.items():
            for frame in frames_after(files, positions.get(replica, 0)):
                if frames >= _MOST_FRAMES:
                    more = True
                    break
                frames += 1
                reached[replica] = frame.sequence
                tables = (frame.predictions, frame.others)
                predictions.extend(_slim(table) for table in tables if table is not None)
                if frame.labels is not None:
                    labels.append(frame.labels.select(LABEL_SCHEMA.names))
                _add(counts, frame.counts)
    if not reached:
        return None
    return Delta(
        buckets=counts,
        predictions=_joined(predictions, prediction_schema()),
        labels=_joined(labels, LABEL_SCHEMA),
        positions=reached,
        gone=frozenset(positions) - live.keys(),
        more=more,
    )


def keep_from(folder: Path, reader: str, positions: Mapping[str, int]) -> None:
    """Ask that nothing beyond ``positions`` be removed; to be said again within ``READER_PATIENCE_S``.

    Where the log cannot be written to, nothing of it is removed either.
    """
    path = readers_folder(folder) / f"{reader}.json"
    write_whole(path, json.dumps(dict(positions)).encode())


def wanted_from(folder: Path) -> list[Mapping[str, int]]:
    """Return the positions of all readers that have been heard of lately.

    One whose file is damaged may still want everything.
    """
    found = []
    for path in sorted(readers_folder(folder).glob("*.json")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > READER_PATIENCE_S:
                path.unlink(missing_ok=True)
            else:
                found.append(_positions(path.read_bytes()))
    return found


def _positions(data: bytes) -> Mapping[str, int]:
    try:
        told = json.loads(data)
    except ValueError:
        return {}
    is_sound = isinstance(told, dict) and all(isinstance(at, int) for at in told.values())
    return told if is_sound else {}


def _slim(table: pa.Table) -> pa.Table:
    if "model" in table.column_names:
        table = table.filter(pc.is_null(table["model"]))
    shadows = [name for name in table.column_names if name.startswith(SHADOW)]
    return table.select([*prediction_schema().names, *shadows])


def _joined(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), *tables], promote_options="default")


def _add(total: Counts, more: Counts) -> None:
    for digest, days in more.items():
        known = total.setdefault(digest, {})
        for day, profile in days.items():
            known[day] = known[day].merge(profile) if day in known else profile
