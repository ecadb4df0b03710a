"""Clean functions that Ray's workers can import."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def keep_even(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(pc.bit_wise_and(table["n"], 1), 0))


def fails_late(table: pa.Table) -> pa.Table:
    if pc.max(table["n"]).as_py() > 1_000_000:
        raise KeyError("price")
    return table


def first_row(table: pa.Table) -> pa.Table:
    return table.slice(0, 1)


def four_at_most(table: pa.Table) -> pa.Table:
    if table.num_rows > 4:
        raise MemoryError(f"{table.num_rows} rows at once")
    return table
