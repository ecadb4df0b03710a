"""Write the flights of a stretch of time as requests for batch scoring.

python -m flights.export 2013-03-02 2013-03-03 flights_to_score.parquet
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flights.data import read_flights

INPUTS = ("carrier", "flight", "tailnum", "origin", "dest", "distance", "sched_dep", "sched_arr")


def export(since: datetime, until: datetime, path: Path) -> int:
    """Write what is known at scheduled departure of the flights in [since, until); return the rows."""
    flights = read_flights()
    time = flights["sched_dep"]
    inside = pc.and_(
        pc.greater_equal(time, pa.scalar(since, time.type)),
        pc.less(time, pa.scalar(until, time.type)),
    )
    rows = flights.filter(inside).select(["flight_id", *INPUTS])
    pq.write_table(rows, path)
    return int(rows.num_rows)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    first, last = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in sys.argv[1:3])
    print(f"{export(first, last, Path(sys.argv[3])):,} flights")
