"""The rows of a query, written down once, so that a job that is interrupted goes on with the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from mlops_ray.config.batch import BatchPredict
from mlops_ray.config.features import RequestField, Sql
from mlops_ray.features.definitions import ARROW_TYPES
from mlops_ray.features.sources.sql import read_sql
from mlops_ray.metadata.digest import digest_tree
from mlops_ray.metadata.files import write_whole
from mlops_ray.serving.batch import inputs
from mlops_ray.serving.batch.texts import TypedReader

_SEAL = "rows.json"
_FILES = "rows"


def staged_query(batch: BatchPredict, fields: Mapping[str, RequestField], folder: Path) -> Any:
    """Return the rows of the query as an ``Input``: those in ``folder`` where they are there whole.

    Raises:
        SourceError: The database cannot be reached, or the query fails.
    """
    seal = folder / _SEAL
    if not seal.is_file():
        _stage(batch, folder)
    files = sorted(str(path) for path in (folder / _FILES).iterdir())
    raw, pieces = inputs.of_parquet(fs.LocalFileSystem(), files, batch.piece_rows)
    schema = pa.schema([(field.name, _kind(field, fields)) for field in raw.schema])
    reader = TypedReader(raw, schema, frozenset(fields), empty_is_null=False)
    return inputs.Input("sql", reader, pieces, json.loads(seal.read_bytes()))


def _stage(batch: BatchPredict, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    rows = folder / _FILES
    rows.mkdir(parents=True)
    found = read_sql(Sql(url=batch.input, query=batch.query), "batch.input")
    for number, table in enumerate(_tables(found.schema, found.batches, batch.piece_rows)):
        pq.write_table(table, rows / f"{number:06d}.parquet")
    identity = {"kind": "sql", "rows": digest_tree(rows)}
    write_whole(folder / _SEAL, json.dumps(identity).encode())


def _tables(schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    held: list[pa.Table] = [schema.empty_table()]
    count = 0
    for batch in batches:
        held.append(pa.Table.from_batches([batch]))
        count += batch.num_rows
        if count >= rows:
            yield pa.concat_tables(held, promote_options="permissive")
            held, count = [], 0
    if held:
        yield pa.concat_tables(held, promote_options="permissive")


def _kind(field: pa.Field, fields: Mapping[str, RequestField]) -> pa.DataType:
    """Return the type of a column: databases without times or truth values keep texts and numbers."""
    declared = fields.get(field.name)
    if declared is None or declared.dtype == "string":
        return field.type
    wanted = ARROW_TYPES[declared.dtype]
    kind = field.type
    bridged = (
        pa.types.is_null(kind)
        or pa.types.is_string(kind)
        or (declared.dtype == "bool" and pa.types.is_integer(kind))
        or (declared.dtype == "float" and pa.types.is_decimal(kind))
    )
    return wanted if bridged else kind
