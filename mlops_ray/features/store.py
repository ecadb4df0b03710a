"""A project's feature store as one object: what the command line and Python look through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import INSTANT, KEY_TYPES, to_us
from mlops_ray.features.definitions import define
from mlops_ray.features.files import read_batches
from mlops_ray.features.join import join_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.online import EXPIRED, NOT_FOUND, NULL, PRESENT, OnlineStore, open_online
from mlops_ray.features.plan import FeaturePlan, make_plan
from mlops_ray.features.reproduction import TrainingSet, make_training_set
from mlops_ray.features.service import find_service
from mlops_ray.features.statistics import ViewStatistics, view_statistics
from mlops_ray.metadata.home import Home
from mlops_ray.metadata.types import FeatureVersions

if TYPE_CHECKING:
    import ray.data

STATUSES = {PRESENT: "present", NULL: "null", NOT_FOUND: "not found", EXPIRED: "expired"}

_TIME = "asked_at"


class Value(Frozen):
    """One feature of one entity: its value as of a moment, and why it has none."""

    feature: str
    value: int | float | str | bool | Instant | None
    status: str


class FeatureStore:
    """The stores of one project, read together.

    Args:
        features: The declarations.
        home: Where the project keeps its state.
        project: The project's name.
    """

    def __init__(self, features: Features, home: Home, project: str) -> None:
        self.features = features
        self.home = home
        self.project = project
        self.offline = OfflineStore(home.offline(project), features)

    def online(self, readonly: bool = True) -> OnlineStore:
        """Open the online store, for reading or also for writing.

        Raises:
            FeatureStoreError: There is none to read, or it cannot be reached.
        """
        folder = self.home.online(self.project)
        return open_online(self.features, folder, self.project, readonly)

    def plan(self) -> FeaturePlan:
        """Return the difference between the definitions and the store."""
        return make_plan(self.features, self.offline)

    def statistics(self, view: str, version: int | None = None) -> ViewStatistics:
        """Return the statistics of a view's rows at a version of its table, the newest when None."""
        return view_statistics(self.features, self.offline, view, version)

    def get(
        self,
        view: str,
        key: Mapping[str, Any],
        at: datetime | None = None,
        *,
        offline: bool = False,
    ) -> list[Value]:
        """Return the features of one entity as of ``at`` (now when None), from one of the stores.

        Args:
            view: The view's name.
            key: The entity's key columns and their values.
            at: A moment; one without a time zone is UTC.
            offline: Join the offline store as of that moment, instead of asking the online one.

        Raises:
            FeatureStoreError: There is no such view, or the key does not fit its entity.
        """
        moment = _aware(at) or datetime.now(UTC)
        given = self._key_table(view, key)
        if offline:
            return self._offline_values(view, given, moment)
        return self._online_values(view, given, moment)

    def scan(
        self,
        view: str,
        version: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> ray.data.Dataset:
        """Return a view's rows with ``since`` ≤ event time ≤ ``until`` as a Ray dataset."""
        return self.offline.scan(view, version, _aware(since), _aware(until))

    def export(
        self,
        view: str,
        output: Path,
        version: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> int:
        """Write the rows that ``scan`` gives to ``output/rows.parquet``; return how many.

        They pass through in bounded memory. The folder is made; it may not be there yet.
        """
        schema, folder = define(self.features, view).schema, self.offline.path(view)
        bounds = (_aware(since), _aware(until))
        since_us, until_us = (None if end is None else to_us(end) for end in bounds)
        files = self.offline.files(view, version)
        output.mkdir(parents=True)
        rows = 0
        with pq.ParquetWriter(output / "rows.parquet", schema) as writer:
            for file in files:
                if file.overlaps(since_us, until_us):
                    for batch in read_batches(folder, file, schema, since_us, until_us):
                        writer.write_table(batch)
                        rows += batch.num_rows
        return rows

    def training_set(
        self, service: str, rows: pa.Table, until: datetime | None = None
    ) -> TrainingSet:
        """Return the labelled rows with a service's features as of their times, and the manifest.

        The newest versions of the views' tables are used, and pinned by the manifest.

        Args:
            service: The service's name.
            rows: The cleaned rows of the label source.
            until: Labels known later do not count; None takes all.
        """
        views = find_service(self.features, service).views
        versions = FeatureVersions(versions={view: self.offline.version(view) for view in views})
        moment = _aware(until)
        return make_training_set(self.features, service, rows, self.offline, versions, moment)

    def push(self, source: str, rows: pa.Table | Sequence[Mapping[str, Any]]) -> int:
        """Send events to a pushed source; return how many, once they are durable.

        Raises:
            RequestError: An event does not fit the source's columns, says which; none was taken.
        """
        from mlops_ray.features.push import push_events

        given = rows if isinstance(rows, pa.Table) else [dict(row) for row in rows]
        return push_events(self.features, self.home, self.project, source, given)

    def _key_table(self, view: str, key: Mapping[str, Any]) -> pa.Table:
        keys = define(self.features, view).keys
        if set(key) != set(keys):
            raise FeatureStoreError(
                f"view {view!r} is looked up by {', '.join(keys)}, not by {', '.join(key) or 'nothing'}",
                fix=f"give {' '.join(f'{name}=…' for name in keys)}",
            )
        columns = {}
        for name, dtype in keys.items():
            if not isinstance(key[name], int if dtype == "int" else str):
                raise FeatureStoreError(
                    f"key {name!r} is {key[name]!r}, which is no {dtype}",
                    where=f"features.views.{view}",
                )
            try:
                columns[name] = pa.array([key[name]], KEY_TYPES[dtype])
            except OverflowError as error:
                raise FeatureStoreError(
                    f"key {name!r} is {key[name]}, which does not fit in 64 bits",
                    where=f"features.views.{view}",
                ) from error
        return pa.table(columns)

    def _online_values(self, view: str, given: pa.Table, moment: datetime) -> list[Value]:
        reader = self.online().reader([view])
        keys = [[given[name].to_numpy() for name in given.column_names]]
        at_us = np.array([to_us(moment)])
        table, statuses = reader.read_table(keys, at_us)
        (row,) = table.to_pylist()
        names = define(self.features, view).feature_names
        return [
            Value(feature=name, value=row[f"{view}__{name}"], status=STATUSES[status])
            for name, status in zip(names, statuses[0].tolist(), strict=True)
        ]

    def _offline_values(self, view: str, given: pa.Table, moment: datetime) -> list[Value]:
        rows = given.append_column(_TIME, pa.array([moment], INSTANT))
        joined = join_view(self.features, view, rows, _TIME, self.offline)
        found = []
        for name in define(self.features, view).feature_names:
            value = joined[f"{view}__{name}"][0].as_py()
            status = "present" if value is not None else "null or not found"
            found.append(Value(feature=name, value=value, status=status))
        return found


def _aware(moment: datetime | None) -> datetime | None:
    """Return a moment with its time zone; one that has none is UTC."""
    if moment is None or moment.tzinfo is not None:
        return moment
    return moment.replace(tzinfo=UTC)
