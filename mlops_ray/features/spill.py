"""Spill files: the rows of one piece, parted by entity, on disk between the stages of a backfill.

A spill file is an Arrow file with one record batch for each part, in order, so that a task of the
next stage reads its part of every file and nothing else. It appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mlops_ray.features.arrivals import Origin, batches, needed
from mlops_ray.features.files import buckets_of
from mlops_ray.features.pieces import Piece
from mlops_ray.features.tiles import stable_order


def spill(
    origin: Origin, piece: Piece, after_us: int, upto_us: int, parts: int, target: Path
) -> int:
    """Write the rows of a piece that decide the arrivals in (after, upto]; return how many."""
    kept = [needed(origin, rows, after_us, upto_us) for rows in batches(origin, piece.read())]
    rows = pa.concat_tables(kept).combine_chunks()
    part = buckets_of(rows, [*origin.definition.keys], parts)
    order = stable_order(part.astype(np.int64))
    ends = np.searchsorted(part[order], np.arange(parts), side="right")
    whole = _one_batch(rows.take(pa.array(order)))
    staged = target.with_suffix(".staged")
    with pa.ipc.new_file(str(staged), whole.schema) as writer:
        start = 0
        for end in ends.tolist():
            writer.write_batch(whole.slice(start, end - start))
            start = end
    os.replace(staged, target)
    return int(rows.num_rows)


def read_part(files: Iterable[Path], part: int) -> Iterator[pa.Table]:
    """Return a part's rows of each spill file, in order of the files."""
    for path in files:
        with pa.memory_map(str(path)) as source:
            yield pa.Table.from_batches([pa.ipc.open_file(source).get_batch(part)])


def _one_batch(rows: pa.Table) -> pa.RecordBatch:
    if not rows.num_rows:
        return pa.RecordBatch.from_pylist([], schema=rows.schema)
    (batch,) = rows.combine_chunks().to_batches()
    return batch
