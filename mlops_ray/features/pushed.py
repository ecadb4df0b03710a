"""Pushed events: on disk before they are acknowledged, online at once, offline soon after.

An event is stamped with the moment when it was received, is appended to its source's log, and goes
through the same pipeline as a backfill of that log would take it. The stamp is later than all that
the pipeline has done, so both make the same rows to the bit.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlops_ray.config.features import Expectation, Features, Source
from mlops_ray.errors import FeatureStoreError, MlopsRayError, RequestError
from mlops_ray.features.arrivals import origin_of, prepare
from mlops_ray.features.columns import INSTANT, from_us, to_us
from mlops_ray.features.definitions import source_of
from mlops_ray.features.expectations import check
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import OnlineStore
from mlops_ray.features.pipeline import FeaturePipeline
from mlops_ray.features.sources.events import (
    RECEIVED_AT,
    Rows,
    check_events,
    complete_until,
    event_schema,
)
from mlops_ray.features.sources.loading import clean_file, clean_table
from mlops_ray.features.sources.log import EventLog, read_log
from mlops_ray.features.tables import open_table, table_path, write_table

logger = logging.getLogger(__name__)

COMMIT_ROWS = 20_000
COMMIT_EVERY_S = 60.0


@dataclass
class _Push:
    """Events on their way into the log."""

    source: str
    events: pa.Table
    stored: bool = False
    error: Exception | None = None


class PushedFeatures:
    """Owns the views that are made from pushed sources, and takes in their events.

    One for each project; the logs' locks see to it. Its methods may be called from several threads;
    those that push at the same time share one write to disk. After a crash a new one has every
    event that was acknowledged.

    Args:
        features: The declarations.
        events: The folder of the events of all sources.
        offline: The offline store.
        online: The online store, open for writing.
        commit_rows: After how many events the feature rows are committed offline.
        commit_every_s: After how long at the latest.
        now_us: The clock, µs since 1970.

    Raises:
        FeatureStoreError: No source is pushed, or another process takes in this project's events.
    """

    def __init__(
        self,
        features: Features,
        events: Path,
        offline: OfflineStore,
        online: OnlineStore,
        *,
        commit_rows: int = COMMIT_ROWS,
        commit_every_s: float = COMMIT_EVERY_S,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._features = features
        self._folder = events
        self._offline, self._online = offline, online
        self._commit_rows, self._commit_every_s = commit_rows, commit_every_s
        self._now_us = now_us
        self._sources = {n: s for n, s in features.sources.items() if s.push is not None}
        if not self._sources:
            raise FeatureStoreError(
                "no source of this project takes pushed events",
                where="features.sources",
                fix="declare one with push: {column: type, …}",
            )
        self._views = [n for n in features.views if source_of(features, n).push is not None]
        self._queue: list[_Push] = []
        self._queueing, self._storing = threading.Lock(), threading.Lock()
        self._logs = {
            name: EventLog(events / name, event_schema(source.push or {}))
            for name, source in self._sources.items()
        }
        self._pipeline: FeaturePipeline | None = None
        self._error = ""
        self._uncommitted = self._made = 0
        self._committed_s = time.monotonic()
        self._last_us = 0
        self._open()

    def push(self, source: str, rows: Rows) -> int:
        """Take in events; return how many, once they are on disk and seen online.

        Where the stores cannot take them now they are seen later, and ``status`` says why.

        Args:
            source: A source with ``push``.
            rows: Mappings from column to value, or a table; see ``events.check_events``.

        Raises:
            RequestError: An event is not what is declared, or the clean function refuses it; none of
                these rows was taken in.
            FeatureStoreError: There is no such source, or the disk refuses them.
        """
        push = _Push(source, check_events(_push_columns(self._sources, source), rows))
        if not push.events.num_rows:
            return 0
        with self._queueing:
            self._queue.append(push)
        with self._storing:
            if not push.stored and push.error is None:
                with self._queueing:
                    due, self._queue = self._queue, []
                self._take_in(due)
        if push.error is not None:
            raise push.error
        if not push.stored:
            raise FeatureStoreError(
                "the events could not be stored", where=source, fix="send them again"
            )
        return int(push.events.num_rows)

    def tick(self) -> int:
        """Let time pass: windows that are complete now are made; return how many feature rows."""
        with self._storing:
            if self._pipeline is None:
                self._try(self._open)
            if self._pipeline is None:
                return 0
            self._last_us = max(self._last_us + 1, self._now_us())
            made = self._advance()
            waited_s = time.monotonic() - self._committed_s
            if (self._uncommitted or self._made) and waited_s >= self._commit_every_s:
                self._try(self._commit)
            return made

    def commit(self) -> None:
        """Write all that was made to the offline store."""
        with self._storing:
            if self._pipeline is None:
                self._open()
            self._commit()

    def status(self) -> dict[str, Any]:
        """Return up to when all is made, how many events wait for a commit, and what is wrong."""
        return {
            "until": from_us(self._last_us).isoformat(),
            "uncommitted": self._uncommitted,
            "error": self._error,
        }

    def close(self) -> None:
        """Commit, and let another process take in the events."""
        with self._storing:
            if self._pipeline is not None:
                self._try(self._commit)
            for log in self._logs.values():
                log.close()

    def _open(self) -> None:
        """Open the pipeline over what the logs hold; the last stamp is behind all that was done."""
        folder = self._folder / ".opening"
        shutil.rmtree(folder, ignore_errors=True)
        for name, source in self._sources.items():
            raw = read_log(self._folder / name, event_schema(source.push or {}))
            write_table(folder, f"{name} raw", raw.batches, raw.schema)
            file = table_path(folder, f"{name} raw")
            self._last_us = max(self._last_us, complete_until(source, open_table(file)) or 0)
            cleaned = clean_file(source, file, f"features.sources.{name}")
            write_table(folder, name, cleaned.batches, cleaned.schema)
        pipeline = FeaturePipeline(
            self._features, folder, self._offline, self._online, views=self._views, live=True
        )
        # What was made before the end of the last process may lie behind its last event.
        if pipeline.done is not None:
            self._last_us = max(self._last_us, to_us(pipeline.done))
        for view in self._views:
            cursor = self._online.cursor(view)
            if cursor is not None and cursor.watermark_us is not None:
                self._last_us = max(self._last_us, cursor.watermark_us)
        self._made = pipeline.advance(from_us(self._last_us), commit=False)
        shutil.rmtree(folder)
        self._pipeline, self._error = pipeline, ""

    def _take_in(self, due: Sequence[_Push]) -> None:
        """Store what waits, of each source in one piece."""
        if self._pipeline is None:
            self._try(self._open)
        self._last_us = max(self._last_us + 1, self._now_us())
        for name in dict.fromkeys(push.source for push in due):
            some = [push for push in due if push.source == name]
            if not self._store(name, some) and len(some) > 1:
                for push in some:
                    self._store(name, [push])
        self._advance()
        if self._uncommitted >= self._commit_rows:
            self._try(self._commit)

    def _store(self, name: str, pushes: Sequence[_Push]) -> bool:
        """Clean and store events; what is refused as a whole is tried one by one."""
        events = pa.concat_tables([push.events for push in pushes])
        stamps = pa.repeat(pa.scalar(self._last_us, pa.int64()), events.num_rows).cast(INSTANT)
        stamped = events.append_column(RECEIVED_AT, stamps)
        try:
            cleaned = clean_table(self._sources[name], stamped, f"features.sources.{name}")
            table = cleaned.read_all()
            for view in self._views:
                if self._features.views[view].source == name:
                    prepare(origin_of(self._features, view), table)
            check(table, _of_rows(self._sources[name], table.schema), f"features.sources.{name}")
            self._logs[name].append(stamped)
        except Exception as error:
            for push in pushes:
                push.error = _refusal(error)
            return False
        for push in pushes:
            push.stored, push.error = True, None
        self._uncommitted += events.num_rows
        pipeline = self._pipeline
        if pipeline is not None:
            self._try(lambda: pipeline.extend(name, table))
        return True

    def _advance(self) -> int:
        made: list[int] = []
        pipeline = self._pipeline
        if pipeline is not None:
            self._try(lambda: made.append(pipeline.advance(from_us(self._last_us), commit=False)))
        self._made += sum(made)
        return sum(made)

    def _commit(self) -> None:
        assert self._pipeline is not None
        self._pipeline.commit()
        self._uncommitted = self._made = 0
        self._committed_s = time.monotonic()

    def _try(self, act: Callable[[], Any]) -> None:
        """Act on the stores. The events are in the log: after a failure they are taken from there."""
        try:
            act()
        except Exception as error:
            logger.exception("pushed events are stored, but not in the feature stores yet")
            self._pipeline, self._error = None, str(error)


def _push_columns(sources: dict[str, Source], name: str) -> Any:
    if name not in sources:
        raise FeatureStoreError(
            f"there is no source {name!r} that takes pushed events",
            fix=f"known: {', '.join(sources)}",
        )
    return sources[name].push


def _of_rows(source: Source, schema: pa.Schema) -> list[Expectation]:
    """Return what must hold for each row by itself; the rest is evaluated of the whole log.

    A column of nulls alone may have lost its type in the clean function.
    """
    typeless = {field.name for field in schema if pa.types.is_null(field.type)}
    due = []
    for wanted in source.expectations:
        if wanted.check is None and wanted.severity == "fail":
            nulls = 0.0 if wanted.nulls == 0 else None
            if wanted.column in typeless:
                due.append(Expectation(column=wanted.column, nulls=nulls))
            else:
                due.append(wanted.model_copy(update={"nulls": nulls, "unique": False}))
    return due


def _refusal(error: Exception) -> Exception:
    if isinstance(error, FeatureStoreError) or not isinstance(error, MlopsRayError):
        return error
    return RequestError(f"the events cannot be used: {error}")
