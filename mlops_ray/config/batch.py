"""Declaration of batch scoring: what is scored, where the scores go, what may be wrong with rows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlops_ray.config.base import Frozen

Format = Literal["parquet", "delta", "csv", "json", "sql"]
Place = Annotated[str, BeforeValidator(str)]
"""A path, the URI of an object store, or a database's SQLAlchemy URL."""

_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
}
_STORES = {"s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file"}


class BatchPredict(Frozen):
    """Batch scoring with a registered model: ``model`` is ``name@alias`` or ``name@version``.

    ``input`` is a file, a folder or a glob of Parquet, CSV or JSON lines, a Delta table, or a
    database's SQLAlchemy URL together with a ``query``. ``output`` is a folder of Parquet, CSV or
    JSON lines, one file of CSV or JSON lines where it has their suffix, a Delta table, or a
    database's URL together with a ``table``. Formats are told by suffix, URL and what is there;
    of an output they are the input's where nothing tells.

    Its whole content is replaced, or with ``append`` (Delta, SQL) added to. Rows that are not what
    the model's service declares go to ``rejected``, a Parquet file (by default
    ``<output>.rejected.parquet``); where they are more than a share ``max_rejected`` of all, the
    job fails and the output stays as it was. ``id`` names a column in which no value may come twice.

    ``workers`` processes work at once; None: as many as the cluster has CPUs. Each holds about
    ``batch_rows`` rows at a time. A piece of at most ``piece_rows`` is what a killed job may have
    to score again. With ``log``, rows go into the project's prediction log too.
    """

    model: str
    input: Place
    output: Place
    input_format: Format | None = None
    output_format: Format | None = None
    query: str = ""
    table: str = ""
    append: bool = False
    id: str | None = None
    rejected: Place | None = None
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    log: bool = False
    workers: int | None = Field(default=None, ge=1)
    batch_rows: int = Field(default=16_384, ge=1)
    piece_rows: int = Field(default=1_048_576, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.reads == "sql") != bool(self.query):
            raise ValueError("query goes with an input that is a database's URL, and only with it")
        if (self.writes == "sql") != bool(self.table):
            raise ValueError("table goes with an output that is a database's URL, and only with it")
        if self.append and self.writes not in ("delta", "sql"):
            raise ValueError("only a Delta table (output_format: delta) or SQL can be appended to")
        return self

    @property
    def reads(self) -> Format | None:
        """The input's format, None where only the files can tell."""
        return self.input_format or told_by(self.input)

    @property
    def writes(self) -> Format | None:
        """The output's format, None where it is the input's."""
        return self.output_format or told_by(self.output)


def told_by(place: str) -> Format | None:
    """Return the format that a place's name tells, None where it tells none."""
    scheme, found, _ = place.partition("://")
    if found and scheme not in _STORES:
        return "sql"
    return next((kind for suffix, kind in _SUFFIXES.items() if place.endswith(suffix)), None)
