"""The pipeline: source rows become feature rows, in the offline store and in the online store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from mlops_ray.config.features import Features
from mlops_ray.features.arrivals import prepare
from mlops_ray.features.columns import from_us, to_us
from mlops_ray.features.course import SPREAD_ROWS, Course
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import OnlineStore


class FeaturePipeline:
    """Advances every view of a feature store through time.

    Backfill and incremental advance are the same: ``advance(until)`` takes the rows that may be used
    from some moment in (last advance, until] on, and writes the feature rows that follow from them.
    Online they are seen at once, offline with the next ``commit``. The offline watermark of each view
    says where a new pipeline takes up; rows that were not committed are then computed again, to the
    same bits. After an error, open a new pipeline.

    More rows than memory should hold are made on disk, by tasks of the Ray cluster where one is up,
    and are committed at once; see ``backfill``.

    Args:
        features: The declarations.
        tables: All cleaned rows of each source, by its name; or the folder of their files, which
            saves a copy where there are many.
        offline: The offline store.
        online: The online store, open for writing.
        views: Which views, all when None. A view's origin must be among them.
        spread_rows: From how many waiting rows of a view on they are made on disk.
        live: Events come in by ``extend``, stamped after the last advance. Else their views advance
            no further than to the last event that is in the tables: later ones may be on their way.

    Raises:
        FeatureStoreError: A source's table is not given.
        SchemaError: A table lacks a column that a view needs, or it has the wrong type.
    """

    def __init__(
        self,
        features: Features,
        tables: Mapping[str, pa.Table] | Path,
        offline: OfflineStore,
        online: OnlineStore,
        *,
        views: Collection[str] | None = None,
        spread_rows: int = SPREAD_ROWS,
        live: bool = False,
    ) -> None:
        self._features = features
        self._online = online
        self._courses: dict[str, Course] = {}
        for name in features.view_order:
            if views is None or name in views:
                view = features.views[name]
                upstream = None if view.view is None else self._courses[view.view]
                self._courses[name] = Course(
                    features, name, tables, offline, online, upstream, spread_rows, live
                )

    @property
    def versions(self) -> dict[str, int]:
        """The version of each view's offline table after the last commit, −1 for no table."""
        named = [name for name in self._features.views if name in self._courses]
        return {name: self._courses[name].version for name in named}

    @property
    def newest(self) -> datetime | None:
        """The last moment at which a source row arrives, None where there are no rows."""
        last = [c.newest_us for c in self._courses.values() if c.newest_us is not None]
        return from_us(max(last)) if last else None

    @property
    def complete_until(self) -> datetime | None:
        """Up to when every view is complete that has got a row so far, None where none has."""
        done = [c.done_us for c in self._courses.values() if c.done_us is not None]
        return from_us(min(done)) if done else None

    @property
    def done(self) -> datetime | None:
        """The furthest moment to which a view was advanced, None where none was."""
        done = [c.done_us for c in self._courses.values() if c.done_us is not None]
        return from_us(max(done)) if done else None

    def advance(self, until: datetime | None, commit: bool = True) -> int:
        """Bring every view up to ``until``; return how many feature rows were made.

        None brings each view as far as its own origin goes: to the last arrival of a batch source,
        to where the events are complete. So a source that lags behind the others loses nothing.

        A boundary of a window is complete, and emitted, only when ``until`` has reached it.
        Moments before the last advance change nothing.

        Args:
            until: An aware moment, or None.
            commit: Also write the rows to the offline store now.
        """
        until_us = None if until is None else to_us(until)
        made = sum(course.advance(until_us) for course in self._courses.values())
        for course in self._courses.values():
            course.go_on_online()
        with self._online.batch():
            for course in self._courses.values():
                course.write_online()
        # Rows of another generation can only be replaced as a whole, from the offline store.
        if commit or any(course.stale for course in self._courses.values()):
            self.commit()
        return made

    def late_rows(self) -> dict[str, int]:
        """Return by view how many source rows came too late since the last call, where any did.

        They arrive up to where the view was committed, and were not in the tables then: no feature
        row follows from them. Call it after a commit.
        """
        late = {name: course.late_rows() for name, course in self._courses.items()}
        return {name: rows for name, rows in late.items() if rows}

    def extend(self, source: str, table: pa.Table) -> None:
        """Take in cleaned rows that a source has got since; none arrived before the last advance."""
        for name, course in self._courses.items():
            if self._features.views[name].source == source:
                course.extend([prepare(course.origin, table)])

    def commit(self) -> dict[str, int]:
        """Write what was advanced since the last commit offline, one Delta commit per view.

        Returns:
            The version of each view's table.
        """
        self._online.flush()
        due = [course for course in self._courses.values() if course.is_due]
        with ThreadPoolExecutor(max_workers=max(1, len(due))) as pool:
            ours = list(pool.map(Course.commit, due))
        for course, own in zip(due, ours, strict=True):
            if not (own and course.move_cursor()):
                course.catch_up()
        return self.versions
