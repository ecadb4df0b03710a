"""A source's rows: extracted from wherever they are, cleaned, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mlops_ray.config.features import Features, Source
from mlops_ray.errors import FeatureStoreError, SchemaError
from mlops_ray.features import expectations
from mlops_ray.features.columns import instants
from mlops_ray.features.expectations import ExpectationResult
from mlops_ray.features.sources.batches import Batches
from mlops_ray.features.sources.cleaning import clean_slices
from mlops_ray.features.sources.events import FETCHED_AT, RECEIVED_AT
from mlops_ray.features.sources.functions import call, read_function
from mlops_ray.features.tables import open_table, table_path, write_table

_STAMPS = (RECEIVED_AT, FETCHED_AT)


@dataclass(frozen=True)
class Cleaned:
    """What came of cleaning a source: rows kept, rows dropped, and how the expectations held."""

    rows: int
    dropped: int
    results: tuple[ExpectationResult, ...]


def find_source(features: Features, name: str) -> Source:
    """Return the declared source.

    Raises:
        FeatureStoreError: There is none of that name.
    """
    if name not in features.sources:
        raise FeatureStoreError(
            f"there is no source {name!r}", fix=f"known sources: {', '.join(features.sources)}"
        )
    return features.sources[name]


def extract_source(features: Features, name: str, folder: Path, events: Path) -> int:
    """Write all raw rows of a source to ``folder/<name>.arrow``; return how many there are.

    Nothing holds all of them in memory, but where a function returns them as one table.

    Args:
        features: The declarations.
        name: Of the source.
        folder: For the file; see ``features.tables``.
        events: The folder of all sources that stream in: Kafka's messages and pushed events are
            kept there, each source in a folder of its own. New messages are fetched first.

    Raises:
        SourceError: The source cannot be read.
    """
    found = open_source(find_source(features, name), events / name, f"features.sources.{name}")
    return write_table(folder, name, found.batches, found.schema)


def open_source(source: Source, events: Path, where: str = "source") -> Batches:
    """Return all rows of a source; every timestamp is ``timestamp[us, UTC]``, naive ones were UTC.

    Args:
        source: The declaration.
        events: The folder of this source's events, where it streams in.
        where: How errors name the source.

    Raises:
        SourceError: It cannot be read.
    """
    # Each kind of source has its own packages, which are imported only where it is used.
    if source.read is not None:
        return read_function(source.read, source.args, where).normalised()
    if source.sql is not None:
        from mlops_ray.features.sources.sql import read_sql

        return read_sql(source.sql, where).normalised()
    if source.kafka is not None:
        from mlops_ray.features.sources.kafka import fetch, fetched_schema
        from mlops_ray.features.sources.log import read_log

        fetch(source.kafka, events, where)
        return read_log(events, fetched_schema(source.kafka, events), where)
    if source.push is not None:
        from mlops_ray.features.sources.events import event_schema
        from mlops_ray.features.sources.log import read_log

        return read_log(events, event_schema(source.push), where)
    from mlops_ray.features.sources.files import read_path

    return read_path(source, where).normalised()


def clean_source(features: Features, name: str, raw: Path, folder: Path) -> Cleaned:
    """Clean ``raw/<name>.arrow`` into ``folder/<name>.arrow`` and evaluate the expectations.

    A failed expectation is in the result, not an error: see ``expectations.enforce``.

    Raises:
        SourceError: The clean function failed or returned no table.
        SchemaError: A column is missing, or has another type than declared.
    """
    source, where = find_source(features, name), f"features.sources.{name}"
    before = open_table(table_path(raw, name))
    found = clean_file(source, table_path(raw, name), where)
    # What a topic's table tells of the fetch holds whichever rows the function kept.
    schema = found.schema.with_metadata(before.schema.metadata if source.kafka else None)
    rows = write_table(folder, name, found.batches, schema)
    after = open_table(table_path(folder, name))
    results = expectations.evaluate(after, source.expectations, where)
    return Cleaned(rows, before.num_rows - rows, tuple(results))


def clean_file(source: Source, file: Path, where: str = "source") -> Batches:
    """Return what ``clean_table`` does for an Arrow file's rows, streaming where ``clean_by`` allows.

    Pushed events are cleaned a few at a time, as they come in, so always by batch.
    """
    by_batch = source.clean_by == "batch" or source.push is not None
    if source.clean is None or not by_batch:
        return clean_table(source, open_table(file), where)
    return _checked(source, Batches.from_first(clean_slices(source.clean, file, where)), where)


def clean_table(source: Source, raw: pa.Table, where: str = "source") -> Batches:
    """Return ``raw`` after the source's clean function, or ``raw`` itself where it has none.

    Raises:
        SourceError: The clean function failed or returned no table.
        SchemaError: The result lacks the column that says when a row is known, or it holds no
            timestamps.
    """
    table = raw if source.clean is None else call(source.clean, {}, where, raw)
    return _checked(source, Batches.of(table), where)


def _checked(source: Source, cleaned: Batches, where: str) -> Batches:
    found = cleaned.normalised()
    instants(found.schema.empty_table(), source.known_at, f"{where}.available_at")
    for name in _STAMPS if source.kafka is not None else _STAMPS[:1] if source.push else ():
        _check_stamp(found.schema, name, where)
    return found


def _check_stamp(schema: pa.Schema, name: str, where: str) -> None:
    if name not in schema.names:
        raise SchemaError(
            f"the clean function dropped the column {name!r}",
            where=where,
            why="it says from when on an event was known here",
            fix=f"keep {name!r} in the table that the clean function returns",
        )
