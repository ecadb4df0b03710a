"""Batches into a Delta table: one commit for each job."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlops_ray.errors import ServingError
from mlops_ray.features.columns import INSTANT
from mlops_ray.metadata.files import sync
from mlops_ray.serving.batch.outputs import beside, part_files

_REPLACED = "mlops-ray-batch-replaced"
_WIDER = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.int64(),
}


class DeltaOutput:
    """A Delta table in a folder. Its content is replaced, or added to.

    The commit carries the job as an application transaction, so that it happens once.
    """

    kind = "parquet"
    headers = True

    def __init__(self, path: Path, append: bool) -> None:
        self._path = path
        self._append = append
        self.work, self.rejected = beside(path)

    def check(self, schema: pa.Schema) -> pa.Schema:
        """Return the types in which Delta knows these columns.

        Raises:
            ServingError: Rows are to be added to a table that is partitioned, or has other columns.
        """
        schema = pa.schema([(field.name, _delta_type(field.type)) for field in schema])
        table = self._open()
        if table is None or not self._append:
            return schema
        if table.metadata().partition_columns:
            raise self._refused("the table is partitioned", "replace it, or write another one")
        there = {field.name: _plain(field.type) for field in pa.schema(table.schema().to_arrow())}
        if there != {field.name: _plain(field.type) for field in schema}:
            raise self._refused(
                f"the table has the columns {', '.join(there)}; the rows {', '.join(schema.names)}",
                "write another table, or replace this one",
            )
        return schema

    @property
    def epoch(self) -> int:
        """How often the content has been replaced by a batch."""
        table = self._open()
        return int((table and table.transaction_version(_REPLACED)) or 0)

    def holds(self, job: str) -> bool:
        """Say whether the table has the job's commit."""
        table = self._open()
        return table is not None and table.transaction_version(_application(job)) is not None

    def commit(self, job: str, schema: pa.Schema, parts: Path) -> None:
        """Move the parts into the table's folder and commit them.

        Raises:
            ServingError: Another writer changed the table's columns or partitions meanwhile.
        """
        from deltalake import CommitProperties, Schema, Transaction
        from deltalake.exceptions import DeltaError
        from deltalake.transaction import create_table_with_add_actions

        if self.holds(job):
            return
        self._path.mkdir(exist_ok=True)
        for part in part_files(parts):
            part.rename(self._path / f"{job}-{part.name}")
        sync(self._path)
        actions = [_add(file) for file in sorted(self._path.glob(f"{job}-part-*.parquet"))]
        transactions = [Transaction(_application(job), 1)]
        if not self._append:
            transactions.append(Transaction(_REPLACED, self.epoch + 1))
        properties = CommitProperties(app_transactions=transactions)
        table, columns = self._open(), Schema.from_arrow(schema)
        mode: Any = "append" if self._append else "overwrite"
        try:
            if table is None:
                create_table_with_add_actions(
                    str(self._path), columns, actions, commit_properties=properties
                )
            else:
                table.create_write_transaction(actions, mode, columns, commit_properties=properties)
        except DeltaError as error:
            raise self._refused(str(error), "run the same batch again: it goes on") from error

    def _open(self) -> Any:
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        try:
            return DeltaTable(str(self._path)) if self._path.is_dir() else None
        except TableNotFoundError:
            return None

    def _refused(self, why: str, fix: str) -> ServingError:
        return ServingError(
            "the rows cannot be put into the Delta table", where=str(self._path), why=why, fix=fix
        )


def _application(job: str) -> str:
    return f"mlops-ray-batch-{job}"


def _add(file: Path) -> Any:
    from deltalake.transaction import AddAction

    statistics = json.dumps({"numRecords": pq.read_metadata(file).num_rows})
    now_ms = time.time_ns() // 1_000_000
    return AddAction(file.name, file.stat().st_size, {}, now_ms, True, statistics)


def _delta_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return INSTANT
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return _WIDER.get(kind, kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type without Arrow's ways to lay the same values out."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return kind
