"""What a replay has measured so far, on disk: parts by virtual time, and a cursor.

cursor.json             up to where the replay is done; everything after it is done again
rows-SINCE.arrow        id, time, version, score, shadow_<alias>, label, known_at
requests-SINCE.arrow    time, rows, latency_ms, error, kind
history.json            what the controller measured and did; written at the end
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.monitoring.labels import SHADOW, TIMESTAMP

_STAMP = "%Y%m%dT%H%M%SZ"

Kind = Literal["predict", "background", "feedback"]
"""A prediction of the history; one sent beside, while waiting; labels."""

REQUEST = pa.schema(
    [
        ("time", TIMESTAMP),
        ("rows", pa.int64()),
        ("latency_ms", pa.float64()),
        ("error", pa.string()),
        ("kind", pa.string()),
    ]
)

ROW = pa.schema(
    [
        ("id", pa.string()),
        ("time", TIMESTAMP),
        ("version", pa.int64()),
        ("score", pa.float64()),
        ("label", pa.float64()),
        ("known_at", TIMESTAMP),
    ]
)
"""Beside these, a column ``shadow_<alias>`` for each model in shadow."""


class Cursor(Frozen):
    """Up to where a replay is done: requests before ``next``, labels known by ``labels_until``.

    ``checkpoint`` names the monitor's state of that moment.
    """

    session: str
    next: Instant
    labels_until: Instant
    checkpoint: str
    wall_s: float
    unlogged_rows: int


@dataclass
class Answers:
    """The answers of a stretch of time, as columns that grow."""

    ids: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, ids: list[str], versions: list[int], scores: list[float]) -> None:
        """Add the answer to one request."""
        self.ids += ids
        self.versions += versions
        self.scores += scores


@dataclass
class Sent:
    """The requests of a stretch of time, as columns that grow. No error means status 200."""

    times: list[datetime] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)

    def add(
        self, time: datetime, rows: int, latency_ms: float, error: str | None, kind: Kind
    ) -> None:
        """Add one request."""
        self.times.append(time)
        self.rows.append(rows)
        self.latencies_ms.append(latency_ms)
        self.errors.append(error)
        self.kinds.append(kind)

    def table(self) -> pa.Table:
        """Return them with the schema ``REQUEST``."""
        columns = [self.times, self.rows, self.latencies_ms, self.errors, self.kinds]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, REQUEST, strict=True)]
        return pa.Table.from_arrays(arrays, schema=REQUEST)


class Recording:
    """The folder of one replay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cursor(self) -> Cursor | None:
        """Return up to where the replay is done, or None where it has not begun."""
        path = self.folder / "cursor.json"
        return Cursor.model_validate_json(path.read_bytes()) if path.exists() else None

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def write(self, since: datetime, rows: pa.Table, sent: Sent) -> None:
        """Write what was done from ``since`` on."""
        moment = since.strftime(_STAMP)
        write_table(rows, self.folder / f"rows-{moment}.arrow")
        write_table(sent.table(), self.folder / f"requests-{moment}.arrow")

    def move(self, cursor: Cursor) -> None:
        """Say up to where the replay is done. What lies before it must be written by now."""
        draft = self.folder / ".cursor.draft"
        draft.write_text(json.dumps(cursor.model_dump(mode="json")))
        os.replace(draft, self.folder / "cursor.json")

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Write what the controller measured and did."""
        (self.folder / "history.json").write_text(json.dumps(history))

    def cut(self, since: datetime) -> None:
        """Remove the parts that begin at ``since`` or later."""
        for path in self.folder.glob("*-*.arrow"):
            if path.stem.partition("-")[2] >= since.strftime(_STAMP):
                path.unlink()

    def rows(self) -> pa.Table:
        """Return the rows of all parts, in order of time."""
        return read_parts(self.folder, "rows")

    def requests(self) -> pa.Table:
        """Return the requests of all parts."""
        return read_parts(self.folder, "requests")


def join_rows(answers: Answers, outcomes: pa.Table, observed: pa.Table) -> pa.Table:
    """Put the client's answers, the known outcomes and the observed shadow scores together.

    Args:
        answers: What the client was answered.
        outcomes: id, time, label, known_at of what it asked, in the order of the result.
        observed: What the monitor saw of the same time, with columns ``shadow_<alias>``.

    Returns:
        One row for each answered row of ``outcomes``. A shadow score not observed is null.
    """
    answered = pa.table(
        {
            "id": pa.array(answers.ids, pa.string()),
            "version": pa.array(answers.versions, pa.int64()),
            "score": pa.array(answers.scores, pa.float64()),
        }
    )
    place = pc.index_in(_array(outcomes, "id"), value_set=_array(answered, "id"))
    rows, place = outcomes.filter(pc.is_valid(place)), place.drop_null()
    columns = {"id": rows["id"], "time": rows["time"]}
    columns |= {name: answered[name].take(place) for name in ("version", "score")}
    seen = pc.index_in(_array(rows, "id"), value_set=_array(observed, "id"))
    for name in observed.column_names:
        if name.startswith(SHADOW):
            columns[name] = observed[name].take(seen)
    return pa.table(columns | {"label": rows["label"], "known_at": rows["known_at"]})


def read_parts(folder: Path, kind: str) -> pa.Table:
    """Return the parts of a kind, ``rows`` or ``requests``, in order."""
    paths = sorted(folder.glob(f"{kind}-*.arrow"))
    parts = [pa.ipc.open_file(pa.OSFile(str(path))).read_all() for path in paths]
    if not parts:
        return (ROW if kind == "rows" else REQUEST).empty_table()
    return pa.concat_tables(parts, promote_options="default").combine_chunks()


def write_table(table: pa.Table, path: Path) -> None:
    """Write an Arrow IPC file that is there whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(draft, path)


def percentile_ms(requests: pa.Table, percent: float) -> float | None:
    """Return a percentile of the latency of the answered predictions, None without any."""
    answered = pc.and_(pc.is_null(requests["error"]), pc.equal(requests["kind"], "predict"))
    latencies = requests.filter(answered)["latency_ms"].to_numpy()
    return float(np.percentile(latencies, percent)) if len(latencies) else None


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
