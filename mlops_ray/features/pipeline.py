"""The pipeline: source rows become feature rows, in the offline store and in the online store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import numpy as np
import pyarrow as pa

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import from_us, instants, to_us
from mlops_ray.features.definitions import CREATED_TIME, EVENT_TIME, ViewDefinition, define
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import OnlineStore
from mlops_ray.features.streams import (
    FeatureRows,
    Stream,
    WindowStream,
    open_stream,
    table_of,
)

RAY_ROWS = 10_000
_ONE_BY_ONE = 256


class FeaturePipeline:
    """Advances every view of a feature store through time.

    Backfill and incremental advance are the same: ``advance(until)`` takes the source rows that
    may be used from some moment in (last advance, until] on, and writes the feature rows that
    follow from them. Online they are seen at once, offline with the next ``commit``. The offline
    watermark of each view says where a new pipeline takes up; rows that were not committed are then
    computed again, to the same bits. After an error, open a new pipeline.

    Args:
        features: The declarations.
        tables: All cleaned rows of each source, by its name.
        offline: The offline store.
        online: The online store, open for writing.
        ray_rows: From how many new source rows of a view on it is computed on Ray Data, where Ray
            is up; below, in process.

    Raises:
        FeatureStoreError: A source's table is not given.
        SchemaError: A table lacks a column that a view needs, or it has the wrong type.
    """

    def __init__(
        self,
        features: Features,
        tables: Mapping[str, pa.Table],
        offline: OfflineStore,
        online: OnlineStore,
        *,
        ray_rows: int = RAY_ROWS,
    ) -> None:
        self._features = features
        self._offline = offline
        self._online = online
        self._ray_rows = ray_rows
        self._streams: dict[str, Stream] = {}
        self._pending: dict[str, list[FeatureRows]] = {name: [] for name in features.views}
        self._until_us: dict[str, int | None] = {}
        self._versions: dict[str, int] = {}
        for name in features.views:
            self._open(name, tables)

    @property
    def versions(self) -> dict[str, int]:
        """The version of each view's offline table after the last commit, −1 for no table."""
        return dict(self._versions)

    @property
    def newest(self) -> datetime | None:
        """The last moment at which a source row arrives, None where there are no rows."""
        last = [s.source.rows.arrival_us[-1] for s in self._streams.values() if s.source.rows]
        return from_us(max(last)) if last else None

    def advance(self, until: datetime, commit: bool = True) -> int:
        """Bring every view up to ``until``; return how many feature rows were written.

        A boundary of a window is complete, and emitted, only when ``until`` has reached it.
        Moments before the last advance change nothing.

        Args:
            until: An aware moment.
            commit: Also write the rows to the offline store now.
        """
        until_us = to_us(until)
        written = 0
        with self._online.batch():
            for name, stream in self._streams.items():
                for rows in self._take(stream, until_us):
                    self._write_online(stream, rows)
                    self._pending[name].append(rows)
                    written += len(rows)
                self._online.move_watermark(name, until_us)
                done_us = self._until_us[name]
                self._until_us[name] = until_us if done_us is None else max(until_us, done_us)
        if commit:
            self.commit()
        return written

    def commit(self) -> dict[str, int]:
        """Write what was advanced since the last commit offline, one Delta commit per view.

        Returns:
            The version of each view's table.
        """
        self._online.flush()
        due = [name for name in self._pending if self._is_due(name)]
        with ThreadPoolExecutor(max_workers=max(1, len(due))) as pool:
            versions = pool.map(self._commit_view, due)
            self._versions |= dict(zip(due, versions, strict=True))
        return self.versions

    def _is_due(self, name: str) -> bool:
        """A view without new rows needs no commit, but for the one that makes its table."""
        new = bool(self._pending[name]) or self._versions[name] < 0
        return new and self._until_us[name] is not None

    def _commit_view(self, name: str) -> int:
        stream, pending = self._streams[name], self._pending[name]
        watermark_us = self._until_us[name]
        assert watermark_us is not None
        tables = []
        if pending:
            tables = [table_of(stream.definition, stream.source, FeatureRows.join(pending))]
        version = self._offline.append(name, tables, watermark_us)
        pending.clear()
        return version

    def _open(self, name: str, tables: Mapping[str, pa.Table]) -> None:
        definition = define(self._features, name)
        source = definition.view.source
        if source not in tables:
            raise FeatureStoreError(
                f"the table of source {source!r} is not given",
                where=f"features.views.{name}",
                fix=f"give the step the cleaned table as tables.{source}",
            )
        stored_us = self._offline.watermark(name)
        declared = self._features.sources[source]
        stream = open_stream(definition, declared, tables[source], stored_us)
        self._streams[name] = stream
        self._until_us[name] = stored_us
        self._versions[name] = self._offline.version(name)
        if stored_us is not None:
            self._restore_online(definition, stored_us)

    def _restore_online(self, definition: ViewDefinition, stored_us: int) -> None:
        """Fill the online store from the offline one where it lags behind, as after its loss."""
        online_us = self._online.watermark(definition.name)
        if online_us is not None and online_us >= stored_us:
            return
        table = self._offline.read(definition.name)
        keys = [table[name].to_numpy() for name in definition.keys]
        matrix = np.column_stack(
            [table[name].to_numpy() for name in definition.feature_names]
        ).astype(np.float64)
        null = np.column_stack(
            [table[name].is_null().to_numpy() for name in definition.feature_names]
        )
        event_us = instants(table, EVENT_TIME, definition.name)
        created_us = instants(table, CREATED_TIME, definition.name)
        with self._online.batch():
            self._online.write(definition.name, keys, event_us, created_us, matrix, null)
            self._online.move_watermark(definition.name, stored_us)

    def _take(self, stream: Stream, until_us: int) -> Iterator[FeatureRows]:
        many = stream.waiting(until_us) >= self._ray_rows
        if many and isinstance(stream, WindowStream) and _ray_is_up():
            from mlops_ray.features.backfill import backfill

            yield from backfill(stream, until_us)
            return
        rows = stream.advance(until_us)
        if len(rows):
            yield rows

    def _write_online(self, stream: Stream, rows: FeatureRows) -> None:
        newest = rows.newest() if len(rows) > _ONE_BY_ONE else rows
        keys = [values[newest.entity] for values in stream.source.key_arrays]
        self._online.write(
            stream.definition.name,
            keys,
            newest.event_us,
            newest.created_us,
            newest.values,
            newest.null,
        )


def _ray_is_up() -> bool:
    import ray

    return bool(ray.is_initialized())
