"""A view's rows as a Ray Dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mlops_ray.features.files import WrittenFile, read_batches

if TYPE_CHECKING:
    import ray.data


def scan_files(
    folder: Path,
    files: Sequence[WrittenFile],
    schema: pa.Schema,
    span: tuple[int | None, int | None],
) -> ray.data.Dataset:
    """Return the files' rows with event times (µs) in ``span``, read by tasks in bounded memory."""
    import ray.data

    if not files:
        return ray.data.from_arrow(schema.empty_table())
    places = ray.data.range(len(files), override_num_blocks=len(files))
    reader = _Reader(folder, files, schema, span)
    return places.map_batches(reader, batch_size=1, batch_format="numpy")


class _Reader:
    """Reads files in tasks of Ray Data."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[WrittenFile],
        schema: pa.Schema,
        span: tuple[int | None, int | None],
    ) -> None:
        self._folder = folder
        self._files = files
        self._schema = schema
        self._span = span

    def __call__(self, places: dict[str, Any]) -> Iterator[pa.Table]:
        for place in places["id"]:
            yield self._schema.empty_table()
            yield from read_batches(self._folder, self._files[place], self._schema, *self._span)
