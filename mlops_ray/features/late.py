"""Late source rows: those that a load brings after the moment from which on they were to be known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mlops_ray.config.base import Frozen
from mlops_ray.metadata.digest import canonical_json
from mlops_ray.metadata.files import write_whole

_DAY_US = 86_400_000_000


class Seen(Frozen):
    """The rows of a source that arrive up to a view's watermark, as they were seen when it was set.

    ``table`` and ``generation`` say for which stored rows that holds. Counted by day of arrival (days
    since 1970), so that rows which a source drops for age do not hide others that are new.
    """

    table: str
    generation: str
    watermark_us: int
    rows_by_day: dict[int, int]


def seen_file(table: Path) -> Path:
    """Return the file beside a view's table that keeps what was seen for it."""
    return table.with_name(f"{table.name}.seen.json")


def count_late(
    file: Path,
    arrivals_us: Iterable[NDArray[np.int64]],
    table: str,
    generation: str,
    watermark_us: int,
) -> int:
    """Return how many rows are new since the last call and arrive up to the watermark of then.

    They came too late for the view, which was complete up to there. ``file`` keeps what was seen
    for the next call, which so does not count them again.

    Args:
        file: Of the view.
        arrivals_us: When the source's rows arrive, all of them, in pieces.
        table: The id of the view's table.
        generation: Which code made its rows.
        watermark_us: Up to where the view is complete now.
    """
    before = _read(file)
    same = before is not None and (before.table, before.generation) == (table, generation)
    then, now = Counter[int](), Counter[int]()
    for moments in arrivals_us:
        now.update(_by_day(moments, watermark_us))
        if before is not None and same:
            then.update(_by_day(moments, before.watermark_us))
    seen = Seen(table=table, generation=generation, watermark_us=watermark_us, rows_by_day=now)
    if seen != before:
        write_whole(file, canonical_json(seen) + b"\n")
    return (then - Counter(before.rows_by_day)).total() if before is not None and same else 0


def _read(file: Path) -> Seen | None:
    try:
        return Seen.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _by_day(moments_us: NDArray[np.int64], upto_us: int) -> dict[int, int]:
    days, rows = np.unique(moments_us[moments_us <= upto_us] // _DAY_US, return_counts=True)
    return dict(zip(days.tolist(), rows.tolist(), strict=True))
