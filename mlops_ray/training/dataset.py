"""Encoded rows on disk, for workers to memory-map.

The rows are encoded once, in blocks, so that neither the step nor a worker ever holds all of them:
the operating system's page cache does, once for all workers of a node. On several nodes the home
must lie on storage that all of them see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.lib.format import open_memmap

from mlops_ray.training.encoder import Encoder

_BLOCK_ROWS = 32_768


class TableColumns(Mapping[str, npt.NDArray[Any]]):
    """A table's columns as numpy arrays, converted one at a time when asked for.

    Nulls of numeric columns become NaN; bools are 0 and 1.
    """

    def __init__(self, table: pa.Table, names: tuple[str, ...] | None = None) -> None:
        self._table = table
        self._names = tuple(table.column_names) if names is None else names

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._names or name not in self._table.column_names:
            raise KeyError(name)
        column = self._table.column(name)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.uint8())
        values: npt.NDArray[Any] = column.to_numpy()
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Rows:
    """Encoded rows: ``numeric`` float32 [n, k], ``categorical`` int32 [n, c], ``labels`` float32
    [n], ``ages_s`` float32 [n]: seconds before the newest training row."""

    numeric: npt.NDArray[np.float32]
    categorical: npt.NDArray[np.int32]
    labels: npt.NDArray[np.float32]
    ages_s: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    def weights(self, half_life_s: float | None) -> npt.NDArray[np.float32]:
        """Return each row's weight, float32 [n]: halved with every ``half_life_s`` of age."""
        if half_life_s is None:
            return np.ones(len(self), dtype=np.float32)
        return np.exp2(-np.asarray(self.ages_s, dtype=np.float64) / half_life_s).astype(np.float32)


def write_rows(
    folder: Path,
    table: pa.Table,
    encoder: Encoder,
    *,
    label: str,
    ages_s: npt.NDArray[np.floating[Any]],
) -> Rows:
    """Encode ``table`` (feature and label columns) into files in ``folder`` and map them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table.num_rows
    spec = encoder.spec
    numeric = open_memmap(folder / "numeric.npy", "w+", np.float32, (rows, spec.num_numeric))
    codes = open_memmap(folder / "categorical.npy", "w+", np.int32, (rows, len(spec.categorical)))
    for start in range(0, rows, _BLOCK_ROWS):
        block = table.slice(start, _BLOCK_ROWS)
        stop = start + block.num_rows
        numeric[start:stop], codes[start:stop] = encoder.encode(TableColumns(block))
    np.save(folder / "labels.npy", TableColumns(table)[label].astype(np.float32))
    np.save(folder / "ages_s.npy", ages_s.astype(np.float32))
    for written in (numeric, codes):
        written.flush()
    return open_rows(folder)


def open_rows(folder: Path) -> Rows:
    """Map the rows that ``write_rows`` left in ``folder``, read-only."""
    arrays = {
        field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in fields(Rows)
    }
    return Rows(**arrays)
