"""The answer to a prediction request, and what it looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

JSON = b"application/json"
ARROW = b"application/vnd.apache.arrow.stream"

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("route", pa.string(), nullable=False),
    ]
)


@dataclass(slots=True)
class Answer:
    """Scores in [0, 1] and labels (0 or 1) by prediction id, and which version gave them.

    Where rows were answered by different versions, ``version`` and ``route`` are None, and
    ``versions`` and ``routes`` have one for each row. ``stale``: some features were older than the
    online store would have them, as it could not be reached.
    """

    model: str
    version: int | None
    route: str | None
    ids: list[str]
    scores: NDArray[np.float64]
    labels: list[int]
    versions: list[int] | None = None
    routes: list[str] | None = None
    stale: bool = False

    def row_versions(self) -> NDArray[np.int64]:
        """Return the version that answered each row."""
        if self.versions is not None:
            return np.array(self.versions, np.int64)
        return np.full(len(self.ids), self.version, np.int64)

    def row_routes(self) -> list[str | None]:
        """Return the alias that answered each row."""
        return [*self.routes] if self.routes is not None else [self.route] * len(self.ids)


def json_answer(answer: Answer) -> bytes:
    """Return ``{"model", "version", "route", "ids", "scores", "labels"}``; with ``versions`` and
    ``routes`` too where rows differ in them.
    """
    content: dict[str, Any] = {
        "model": answer.model,
        "version": answer.version,
        "route": answer.route,
        "ids": answer.ids,
        "scores": answer.scores,
        "labels": answer.labels,
    }
    if answer.versions is not None:
        content["versions"], content["routes"] = answer.versions, answer.routes
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def arrow_answer(answer: Answer) -> bytes:
    """Return an Arrow IPC stream with the columns id, score, label, version and route.

    The schema's metadata names the ``model``.
    """
    columns = [
        pa.array(answer.ids, pa.string()),
        pa.array(answer.scores, pa.float64()),
        pa.array(answer.labels, pa.int64()),
        pa.array(answer.row_versions()),
        pa.array(answer.row_routes(), pa.string()),
    ]
    schema = _SCHEMA.with_metadata({"model": answer.model})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue().to_pybytes()
