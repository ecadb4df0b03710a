"""What a batch is cut into: numbered ranges of rows, each read by one worker in one go."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from mlops_ray.config.base import Frozen

Rows = NDArray[np.int64]


class Piece(Frozen):
    """A range of an input's rows.

    ``first`` is the place of its first row in the whole input, ``start`` in its ``file``. In text
    files it lies at ``offset`` and has ``length`` bytes, and ``rows`` counts blank lines too.
    ``values`` are those of columns that the file's folder tells.
    """

    number: int
    first: int
    rows: int
    file: str = ""
    start: int = 0
    offset: int = 0
    length: int = 0
    values: dict[str, Any] = Field(default_factory=dict)


class Refused(NamedTuple):
    """A row that is not scored: its place in the input, the field concerned, what is wrong with it,
    and the row as JSON (where it cannot be read, the text)."""

    row: int
    field: str
    reason: str
    values: str


@dataclass(frozen=True)
class Chunk:
    """Rows as they were read, each with its place in the whole input, int64 [n]."""

    table: pa.Table
    rows: Rows
    refused: list[Refused] = field(default_factory=list)


REFUSED_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("file", pa.string()),
        ("field", pa.string()),
        ("reason", pa.string()),
        ("values", pa.string()),
    ]
)
"""The side table of refused rows."""


def refused_table(refused: list[Refused], file: str) -> pa.Table:
    """Return refused rows as a table."""
    columns: list[Any] = list(zip(*refused, strict=True)) if refused else [()] * 4
    columns.insert(1, [file] * len(refused))
    arrays = [pa.array(c, f.type) for c, f in zip(columns, REFUSED_SCHEMA, strict=True)]
    return pa.table(arrays, schema=REFUSED_SCHEMA)


def cut(groups: list[int], piece_rows: int) -> list[tuple[int, int]]:
    """Return start and length of the pieces of a file whose row groups have these lengths.

    Small groups share a piece; one that is larger than a piece is cut evenly.
    """
    pieces: list[tuple[int, int]] = []
    start = held = 0
    for group in groups:
        if held and held + group > piece_rows:
            pieces.append((start, held))
            start, held = start + held, 0
        held += group
        if held > piece_rows:
            parts = -(-held // piece_rows)
            bounds = [start + held * part // parts for part in range(parts + 1)]
            pieces += [(a, b - a) for a, b in pairwise(bounds)]
            start, held = bounds[-1], 0
    if held:
        pieces.append((start, held))
    return pieces
