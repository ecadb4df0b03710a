"""One view's course through a pipeline: where it stands, what waits, what is not committed yet."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.arrivals import arrivals, batches, needed, origin_of, prepare
from mlops_ray.features.backfill import backfill
from mlops_ray.features.code import code_digest_of
from mlops_ray.features.definitions import source_of
from mlops_ray.features.late import count_late, seen_file
from mlops_ray.features.materialize import materialize_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import Cursor, OnlineStore
from mlops_ray.features.pieces import Piece, pieces_of_file, pieces_of_view
from mlops_ray.features.sources.events import complete_until
from mlops_ray.features.streams import START_US, Stream, open_stream
from mlops_ray.features.tables import open_table, table_path, write_table
from mlops_ray.metadata.digest import digest_file

SPREAD_ROWS = 2_000_000


class Course:
    """Takes one view through time; see ``FeaturePipeline`` for what the arguments mean.

    Few rows go through a stream in memory. Where many wait, the stream is opened only when they
    have been made on disk.

    Args:
        upstream: The course of the view that this one is made from, if it is.
        stale: Whether the stores have rows of another generation, which these are to replace.
    """

    def __init__(
        self,
        features: Features,
        name: str,
        tables: Mapping[str, pa.Table] | Path,
        offline: OfflineStore,
        online: OnlineStore,
        upstream: Course | None,
        spread_rows: int,
        live: bool,
    ) -> None:
        self.name = name
        self.origin = origin_of(features, name)
        self._copies = offline.root / ".backfill" / f"{name}-tables"
        self.newest_us: int | None = None
        self._offline, self._online, self._upstream = offline, online, upstream
        self._spread_rows = spread_rows
        self._tables = tables
        self._generation = code_digest_of(features, name)
        self._source = features.views[name].source
        self.done_us = offline.watermark(name, generation=self._generation)
        self._stand_at(offline.version(name))
        self.stale = self._is_stale()
        self.fresh: pa.Table | None = None
        self._pending: list[pa.Table] = []
        self._unseen: list[pa.Table] = []
        self._filling = self._stored_filling()
        self._limit_us: int | None = None
        self._stream: Stream | None = None
        if self.done_us is not None:
            self.catch_up()
        if self._source is not None and not live:
            table = _table(tables, self._source, name)
            self._limit_us = complete_until(source_of(features, name), table)
        elif upstream is not None:
            self._limit_us = upstream._limit_us
        if self._waiting() < spread_rows:
            self._open()

    @property
    def is_due(self) -> bool:
        """A view without new rows needs no commit, but for the one that makes its table."""
        return self.done_us is not None and (bool(self._pending) or self.version < 0 or self.stale)

    def extend(self, prepared: Sequence[pa.Table]) -> None:
        """Take in rows that the origin has got since."""
        if self._stream is not None:
            self._stream.extend(prepared)

    def advance(self, until_us: int | None) -> int:
        """Make the feature rows up to ``until_us``, None: to the origin's end; return how many."""
        self.fresh = None
        if until_us is None:
            until_us = self._end_us()
            if until_us is None:
                return 0
        if self._limit_us is not None:
            until_us = min(until_us, self._limit_us)
        if (self.done_us is not None and until_us < self.done_us) or until_us <= START_US:
            until_us = self.done_us if self.done_us is not None else START_US
        made = self._make_on_disk(until_us) if self._stream is None else 0
        if self._upstream is not None and self._upstream.fresh is not None:
            self.extend([prepare(self.origin, self._upstream.fresh)])
        assert self._stream is not None
        rows = self._stream.advance(until_us)
        if until_us > START_US:
            self.done_us = until_us
        if rows.num_rows:
            self.fresh = rows
            self._pending.append(rows)
            self._unseen.append(rows)
        return made + int(rows.num_rows)

    def go_on_online(self) -> None:
        """Catch up where another process filled the view anew: without what is not committed."""
        if not self.stale and self.done_us is not None and self._filling != self._stored_filling():
            self.catch_up()

    def write_online(self) -> None:
        """Let what was made and is not online yet be seen there."""
        if self.stale or self.done_us is None:
            return
        for rows in self._unseen:
            self._online.write(self.name, rows)
        self._unseen.clear()
        self.move_cursor()

    def commit(self) -> bool:
        """Write what is pending offline; return whether the online store has all of that version."""
        assert self.done_us is not None
        before = self.version
        schema = self.origin.definition.schema
        rows = pa.concat_tables([schema.empty_table(), *self._pending]).combine_chunks()
        version = self._offline.append(self.name, rows, self.done_us, self._generation)
        self._stand_at(version)
        self._pending.clear()
        stored_us = self._offline.watermark(self.name, generation=self._generation)
        ours = self.version == before + 1 and stored_us == self.done_us
        return ours and not self.stale

    def move_cursor(self) -> bool:
        """Say that the online store has all rows of the version and up to where this course is.

        Returns whether it has: another process may have filled the view anew.
        """
        cursor = Cursor(self._table_id, self.version, self.done_us, self._generation, self._filling)
        return self._online.move_cursor(self.name, cursor)

    def catch_up(self) -> None:
        """Bring the online store up to the offline one."""
        materialize_view(self._offline, self._online, self.name, self._generation)
        cursor = self._online.cursor(self.name) or Cursor()
        self._stand_at(cursor.version)
        self.stale = False
        self._unseen = list(self._pending)
        self._filling = cursor.filling

    def late_rows(self) -> int:
        """Return how many of the source's rows are new and came too late; each is told once."""
        if self._source is None or self.origin.received or self.done_us is None or self.version < 0:
            return 0
        # Of windows, what lies behind the last boundary still waits.
        every_us = 1 if self.origin.plan is None else self.origin.plan.every_us
        done_us = self.done_us // every_us * every_us
        moments = arrivals(self.origin, self._origin_table())
        file = seen_file(self._offline.path(self.name))
        return count_late(file, moments, self._table_id, self._generation, done_us)

    def _end_us(self) -> int | None:
        """Return up to when the origin has told its rows, None where it never had one.

        No other origin's moment will do: this one may lag behind it.
        """
        if self._upstream is not None:
            return self._upstream.done_us
        return self.newest_us if self._limit_us is None else self._limit_us

    def _stored_filling(self) -> str:
        return (self._online.cursor(self.name) or Cursor()).filling

    def _stand_at(self, version: int) -> None:
        self.version = version
        self._table_id = self._offline.table_id(self.name) if version >= 0 else ""

    def _is_stale(self) -> bool:
        cursor = self._online.cursor(self.name)
        other = cursor is not None and (cursor.table or cursor.generation != self._generation)
        return self.done_us is None and (self.version >= 0 or bool(other))

    def _waiting(self) -> int:
        """Return about how many rows wait to be made, and note when the last of them arrives."""
        after_us = START_US if self.done_us is None else self.done_us
        if self._upstream is not None:
            if self._upstream._stream is None:
                return self._spread_rows
            if self._upstream.done_us is None:
                return 0
            files = self._offline.files(self._upstream.name)
            return sum(f.rows for f in files if f.created_us is None or f.created_us[1] > after_us)
        waiting = 0
        for moments in arrivals(self.origin, self._origin_table()):
            if len(moments):
                self.newest_us = max(int(moments.max()), self.newest_us or START_US)
            waiting += int((moments > after_us).sum())
        return waiting

    def _open(self) -> None:
        """Open the stream where the course stands, with the rows that it needs."""
        after_us = START_US if self.done_us is None else self.done_us
        stream = open_stream(self.origin, after_us)
        found = batches(self.origin, self._origin_rows())
        stream.extend([needed(self.origin, rows, after_us, None) for rows in found])
        self._stream = stream

    def _origin_rows(self) -> Iterable[pa.Table]:
        if self._upstream is None:
            return [self._origin_table()]
        return self._upstream.stored()

    def stored(self) -> Iterator[pa.Table]:
        """Return the rows that are stored offline, a bounded number at a time."""
        schema = self.origin.definition.schema
        yield schema.empty_table()
        if self.done_us is not None and not self.stale:
            for piece in pieces_of_view(self._offline, self.name, schema):
                yield from piece.read()

    def _origin_table(self) -> pa.Table:
        assert self._source is not None
        table = _table(self._tables, self._source, self.name)
        prepare(self.origin, table.slice(0, 0))
        return table.select([*self.origin.columns])

    def _make_on_disk(self, until_us: int) -> int:
        """Make all rows up to ``until_us`` and commit them; then open the stream."""
        if self._upstream is not None:
            self._upstream.store()
        made = 0
        while until_us > (START_US if self.done_us is None else self.done_us):
            after_us = START_US if self.done_us is None else self.done_us
            done = backfill(
                self._offline, self.origin, self._pieces(), after_us, until_us, self._generation
            )
            self.done_us = done.until_us
            made += done.rows
            self.catch_up()
        shutil.rmtree(self._copies, ignore_errors=True)
        self._open()
        return made

    def store(self) -> None:
        """Commit what is pending, and bring the online store up to that."""
        if self.is_due:
            self.commit()
            self.catch_up()

    def _pieces(self) -> list[Piece]:
        if self._upstream is not None:
            schema = self._upstream.origin.definition.schema
            return pieces_of_view(self._offline, self._upstream.name, schema)
        assert self._source is not None
        if isinstance(self._tables, Path):
            return pieces_of_file(table_path(self._tables, self._source))
        return pieces_of_file(self._file_of(self._origin_table()))

    def _file_of(self, table: pa.Table) -> Path:
        """Put a table into a file for the tasks; the same rows are one file, also after a kill."""
        staged = f"staged-{os.getpid()}"
        write_table(self._copies, staged, table.to_batches(), table.schema)
        path = table_path(self._copies, staged)
        target = table_path(self._copies, digest_file(path))
        if target.exists():
            path.unlink()
        else:
            path.rename(target)
        return target


def _table(tables: Mapping[str, pa.Table] | Path, source: str, view: str) -> pa.Table:
    if isinstance(tables, Path):
        path = table_path(tables, source)
        if path.exists():
            return open_table(path)
    elif source in tables:
        return tables[source]
    raise FeatureStoreError(
        f"the table of source {source!r} is not given",
        where=f"features.views.{view}",
        fix=f"give the step the cleaned table as tables.{source}",
    )
