"""What an online store promises: the newest feature row of every entity, read within microseconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mlops_ray.features.online.reader import Reader

PRESENT, NULL, NOT_FOUND, EXPIRED = 0, 1, 2, 3
"""What a read says of each feature; see ``Reader.read``."""

Keys = Sequence[NDArray[Any]]
"""The key columns of an entity, in the declared order, each [n]: int64, or objects (str, None)."""


@dataclass(frozen=True)
class Cursor:
    """Up to where an online store holds a view.

    Args:
        table: Which Delta table (its metadata id) it was filled from; "" before there is one.
        version: The last commit of it that was taken, −1 for none.
        watermark_us: Up to which created time the view was written, be it from the table or before
            its rows are committed there.
        generation: Of the rows: which code made them.
        filling: Names the replacement that the rows began with, "" where there was none. Who moves the
            cursor says by it which rows were written to.
    """

    table: str = ""
    version: int = -1
    watermark_us: int | None = None
    generation: str = ""
    filling: str = ""

    def joined(self, newer: Cursor) -> Cursor:
        """Return ``newer``, but never behind this one while the rows are of the same making."""
        if newer.generation != self.generation or newer.table != self.table != "":
            return newer
        version = newer.version if newer.table != self.table else max(newer.version, self.version)
        known = [m for m in (self.watermark_us, newer.watermark_us) if m is not None]
        return replace(newer, version=version, watermark_us=max(known, default=None))


class OnlineStore(Protocol):
    """What the pipeline writes and serving reads. Every store passes the same tests.

    Every method raises ``FeatureStoreError`` for a view that is not declared, for writing to a store
    that is open for reading, and when the store cannot be reached.
    """

    def write(self, view: str, rows: pa.Table) -> int:
        """Keep the newest row of each entity, stored ones included; return how many were written.

        Newer is by (event time, created time), so the order of writing does not matter; an equal row
        replaces the stored one. Rows whose key has a null are skipped.

        Args:
            view: The view's name.
            rows: Columns of the view's schema, in any order.

        Returns:
            How many rows were newer than what was stored. Inside a batch, a store that decides at its
            end returns how many rows it will decide about.
        """

    def replace(self, view: str, tables: Iterable[pa.Table], cursor: Cursor) -> int:
        """Put these rows and this cursor, with a filling of its own, in the place of all of the view.

        Readers see the old rows until the very end, then the new ones; after a kill on the way, the
        old ones. The tables are taken one by one, so they may be more than fits into memory.

        Returns:
            How many rows were written; of an entity perhaps one after the other.

        Raises:
            FeatureStoreError: It is called inside a batch.
        """

    def batch(self) -> AbstractContextManager[None]:
        """Make all writes and moves inside seen at once, or after an exception not at all.

        Only what the calling thread does is meant.
        """

    def cursor(self, view: str) -> Cursor | None:
        """Return up to where the view is filled, None if never."""

    def move_cursor(self, view: str, cursor: Cursor) -> bool:
        """Say up to where the view is filled; return whether the rows are still those of its filling.

        Where they are not, all were replaced meanwhile, and the cursor stays: what was written before
        may be gone. For rows of one making it never moves back. Inside a batch, a store that decides
        at its end returns True; the cursor says later whether it moved.
        """

    def reader(self, views: Sequence[str]) -> Reader:
        """Return a reader of several views, whose rows it sees in one consistent state."""

    def read_matrix(
        self, view: str, keys: Keys, at_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Return ``reader([view]).read([keys], at_us)``."""

    def drop_undeclared(self) -> None:
        """Forget the rows of views and definitions that are not declared.

        Those of a view whose present definition was never filled stay: they are what is served.
        """

    def clear(self) -> None:
        """Forget everything of the project, in place: readers see it empty."""

    def flush(self) -> None:
        """Make all that was written survive a crash of the machine, where the store decides that."""
