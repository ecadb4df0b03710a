"""Cleaning a source larger than memory: some rows at a time, on Ray Data where a cluster is up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlops_ray.config.targets import load
from mlops_ray.errors import MlopsRayError
from mlops_ray.features.sources.functions import call_function, failed
from mlops_ray.features.tables import open_table

CLEAN_ROWS = 1 << 17
WORTH_S = 15.0
"""From how many seconds of work on Ray Data pays for its start, which takes a few."""


@dataclass(frozen=True)
class CleanSlice:
    """Cleans the rows of an Arrow file that begin at a number; made to be sent to a Ray task."""

    function: Any
    target: str
    file: Path
    where: str

    def __call__(self, starts: pa.Table) -> pa.Table:
        """Return the cleaned rows of the one slice that ``starts`` names."""
        (start,) = starts["start"].to_pylist()
        rows = open_table(self.file).slice(start, CLEAN_ROWS)
        return call_function(self.function, self.target, {}, self.where, rows)


def clean_slices(target: str, file: Path, where: str) -> Iterator[pa.Table]:
    """Yield the rows of an Arrow file, cleaned in slices of at most 131,072, in the file's order.

    The slices are cut alike wherever they are cleaned, so the rows are the same. Only a few of them
    are in memory at a time. The first slice tells whether the others are worth a start of Ray Data.

    Raises:
        SourceError: The clean function failed or returned no table.
    """
    clean = CleanSlice(load(target), target, file, where)
    starts = range(0, max(open_table(file).num_rows, 1), CLEAN_ROWS)
    began_s = time.perf_counter()
    first = clean(pa.table({"start": [starts[0]]}))
    due_s = (time.perf_counter() - began_s) * (len(starts) - 1)
    yield first
    if due_s > WORTH_S and _ray_has_room():
        yield from _on_ray_data(clean, starts[1:])
        return
    for start in starts[1:]:
        yield clean(pa.table({"start": [start]}))


def _on_ray_data(clean: CleanSlice, starts: range) -> Iterator[pa.Table]:
    import ray.data

    # Made here, each a block: from_arrow would first wait for a worker to look at them.
    items = [{"start": start} for start in starts]
    blocks: Any = ray.data.from_items(items, override_num_blocks=len(items))
    dataset = blocks.map_batches(
        clean, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    try:
        yield from dataset.iter_batches(batch_format="pyarrow", batch_size=None)
    except Exception as error:
        raise _cause(error) or failed(clean.target, error, clean.where) from error


def _cause(error: BaseException) -> MlopsRayError | None:
    """Return our own error among those that Ray has wrapped it in."""
    waiting, seen = [error], set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, MlopsRayError) and not hasattr(found, "cause"):
            return found
        if id(found) not in seen:
            seen.add(id(found))
            inner = (getattr(found, "cause", None), found.__cause__)
            waiting += [part for part in inner if isinstance(part, BaseException)]
    return None


def _ray_has_room() -> bool:
    """Whether a cluster is up with a CPU for tasks beside the step that waits for them."""
    import ray

    return ray.is_initialized() and ray.cluster_resources().get("CPU", 0) >= 2
