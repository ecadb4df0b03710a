"""Parity: were the features that requests saw online those that the offline store gives for them?"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.config.base import Frozen, Instant
from mlops_ray.config.features import Features, FeatureService
from mlops_ray.features.code import code_digest_of
from mlops_ray.features.columns import INSTANT, from_us, to_us
from mlops_ray.features.definitions import ARROW_TYPES
from mlops_ray.features.join import join_view
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.service import (
    feature_columns,
    find_service,
    inputs_of,
    on_demand_features,
    stored_columns,
)
from mlops_ray.metadata.prediction_log.fitting import forms_of
from mlops_ray.metadata.prediction_log.layout import REDACTED
from mlops_ray.metadata.prediction_log.reading import scan_predictions

TIME, INPUTS, FEATURES = "time", "inputs", "features"
WINDOW = timedelta(days=1)
"""How much of the log a run looks at unless it is told more."""

_EXAMPLES = 3
_ALWAYS = np.iinfo(np.int64).max


class Difference(Frozen):
    """One row in which a feature differed."""

    id: str
    time: Instant
    online: float | str | None
    offline: float | str | None


class FeatureParity(Frozen):
    """One feature over the ``rows`` that were logged with it.

    ``largest`` is the largest absolute difference of numbers.
    """

    feature: str
    rows: int
    different: int
    largest: float | None = None
    examples: tuple[Difference, ...] = ()

    @property
    def share(self) -> float:
        """The share of rows in which the feature differed."""
        return self.different / self.rows if self.rows else 0.0


class ParityReport(Frozen):
    """What a parity job found among the requests from ``since`` on.

    ``waiting`` rows were asked for a moment up to which the offline store is not complete yet;
    ``without_inputs`` were logged without what is needed to look them up. ``breached``: some
    feature differs in more than the share ``threshold`` of its rows. Nothing is known of the
    features ``not_logged``: rows were compared, and none was logged with them.
    """

    service: str
    since: Instant | None
    until: Instant | None
    rows: int
    waiting: int
    without_inputs: int
    threshold: float
    tolerance: float
    breached: bool
    features: tuple[FeatureParity, ...]
    not_logged: tuple[str, ...] = ()


def check_parity(
    features: Features,
    service: str,
    store: OfflineStore,
    log: Path,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    window: timedelta | None = WINDOW,
    tolerance: float = 0.0,
    threshold: float = 0.0,
) -> ParityReport:
    """Join the logged requests offline as of their times and compare feature by feature.

    Equal are values with the same bits; NaN, null and a missing row are one and the same. Rows are
    read in bounded batches. What batches have scored is not compared: it was not asked online.

    Args:
        features: The declarations.
        service: The service whose requests were logged.
        store: The offline store.
        log: The project's prediction log.
        since: Earliest request time; without it ``window`` says how far back to look.
        until: Latest request time, if any.
        window: How long before the newest request that can be compared; None or zero looks at the
            whole log, in which an old incident, or many good days, outweigh what happens now.
        tolerance: How far numbers may lie apart, relative to the larger one, and still be equal.
        threshold: The share of rows in which a feature may differ.
    """
    declared = find_service(features, service)
    numeric, categorical = feature_columns(features, service)
    known_us = _complete_until_us(features, store, declared.views)
    if since is None and window and known_us is not None:
        since = _window_start(log, window, known_us, until)
    tally = {name: _Tally(name) for name in (*numeric, *categorical)}
    rows = waiting = without = 0
    for batch in scan_predictions(log, since=since, until=until, live=True):
        found = batch.filter(pa.array(_is_whole(batch, declared)))
        without += batch.num_rows - found.num_rows
        if known_us is not None:
            known = found.filter(pc.less_equal(found[TIME], pa.scalar(known_us, INSTANT)))
            waiting, found = waiting + found.num_rows - known.num_rows, known
        else:
            waiting, found = waiting + found.num_rows, found.slice(0, 0)
        if found.num_rows:
            rows += found.num_rows
            _compare(features, service, store, found, tally, tolerance)
    results = tuple(item.result() for item in tally.values())
    return ParityReport(
        service=service,
        since=since,
        until=until,
        rows=rows,
        waiting=waiting,
        without_inputs=without,
        threshold=threshold,
        tolerance=tolerance,
        breached=any(result.share > threshold for result in results),
        features=results,
        not_logged=tuple(result.feature for result in results if rows and not result.rows),
    )


def export(project: str, report: ParityReport) -> None:
    """Show a report as Prometheus gauges, exported by Ray as ``ray_mlops_ray_parity_…``."""
    from ray.util.metrics import Gauge

    share = Gauge(
        "mlops_ray_parity_different_share",
        "Share of logged requests whose feature differs offline.",
        tag_keys=("project", "service", "feature"),
    )
    rows = Gauge("mlops_ray_parity_rows", "Requests compared.", tag_keys=("project", "service"))
    tags = {"project": project, "service": report.service}
    rows.set(report.rows, tags)
    for feature in report.features:
        if feature.rows:
            share.set(feature.share, tags | {"feature": feature.feature})


def _complete_until_us(features: Features, store: OfflineStore, views: Sequence[str]) -> int | None:
    """Return the moment up to which all views are stored, None where one has no table."""
    marks = [store.watermark(view, generation=code_digest_of(features, view)) for view in views]
    known = [mark for mark in marks if mark is not None]
    return min(known, default=_ALWAYS) if len(known) == len(marks) else None


def _window_start(
    log: Path, window: timedelta, known_us: int, until: datetime | None
) -> datetime | None:
    """Return ``window`` before the newest logged time that can be compared, None without one."""
    end_us = known_us if until is None else min(known_us, to_us(until))
    newest_us = None
    for table in scan_predictions(log, until=from_us(end_us), live=True, columns=[TIME]):
        table_us = pc.max(table[TIME].cast(pa.int64())).as_py()
        newest_us = table_us if newest_us is None else max(newest_us, table_us)
    return None if newest_us is None else from_us(newest_us) - window


def _is_whole(batch: pa.Table, service: FeatureService) -> NDArray[np.bool_]:
    """Return which rows have all of their inputs as they were sent, bool [n]."""
    if INPUTS not in batch.column_names:
        return np.zeros(batch.num_rows, np.bool_)
    whole: NDArray[np.bool_] = batch[INPUTS].is_valid().to_numpy()
    for name, field in service.inputs.items():
        _, known = _logged(batch[INPUTS], name, ARROW_TYPES[field.dtype])
        whole = whole & known
    return whole


def _compare(
    features: Features,
    service: str,
    store: OfflineStore,
    batch: pa.Table,
    tally: dict[str, _Tally],
    tolerance: float,
) -> None:
    inputs = {
        name: _logged(batch[INPUTS], name, ARROW_TYPES[field.dtype])[0]
        for name, field in features.services[service].inputs.items()
    }
    offline = _joined(features, service, store, pa.table(inputs))
    _, categorical = feature_columns(features, service)
    for name, item in tally.items():
        kind = pa.string() if name in categorical else pa.float64()
        values, known = _logged(batch[FEATURES], name, kind)
        if known.any():
            rows = batch.filter(pa.array(known))
            item.add(rows, _values(values)[known], offline[name][known], tolerance)


def _joined(
    features: Features, service: str, store: OfflineStore, inputs: pa.Table
) -> dict[str, NDArray[Any]]:
    """Return every feature of the service as of each row's time, from the offline store."""
    declared = features.services[service]
    stored: dict[str, NDArray[Any]] = {}
    for view in declared.views:
        stored |= stored_columns(join_view(features, view, inputs, declared.time, store))
    return stored | on_demand_features(features, service)(inputs_of(inputs, declared), stored)


def _logged(
    struct: pa.ChunkedArray, name: str, kind: pa.DataType
) -> tuple[pa.ChunkedArray, NDArray[np.bool_]]:
    """Return what was logged under a name, as ``kind``, and in which rows that is known, bool [n].

    It may have been logged in several types, one after the other. It is not known where it is redacted
    or cannot be of this kind, nor where nothing of that name was logged in any row.
    """
    fields = forms_of(struct.type, name)
    values = pa.chunked_array([pa.nulls(len(struct), kind)])
    known = np.full(len(struct), bool(fields))
    for field in fields:
        part, sound = _of_kind(pc.struct_field(struct, field.name), kind)
        values = part if len(fields) == 1 else pc.coalesce(values, part)
        known &= sound
    return values, known


def _of_kind(
    values: pa.ChunkedArray, kind: pa.DataType
) -> tuple[pa.ChunkedArray, NDArray[np.bool_]]:
    sound = np.ones(len(values), np.bool_)
    if pa.types.is_string(values.type):
        redacted = pc.fill_null(pc.starts_with(values, REDACTED), False)
        values = pc.if_else(redacted, None, values)
        sound = ~redacted.to_numpy()
    if values.type == kind:
        return values, sound
    try:
        is_number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
        return values.cast(kind, safe=not (is_number and pa.types.is_floating(kind))), sound
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.chunked_array([pa.nulls(len(values), kind)]), sound & values.is_null().to_numpy()


def _values(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return floats with NaN for null, or an object array of texts with None."""
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), object)
    return np.asarray(column.to_numpy(zero_copy_only=False))


class _Tally:
    """Counts the differences of one feature over batches."""

    def __init__(self, feature: str) -> None:
        self._feature = feature
        self._rows = 0
        self._different = 0
        self._largest: float | None = None
        self._examples: list[Difference] = []

    def add(
        self, batch: pa.Table, online: NDArray[Any], offline: NDArray[Any], tolerance: float
    ) -> None:
        different = differ(online, offline, tolerance)
        rows = np.flatnonzero(different)
        self._rows += len(different)
        self._different += len(rows)
        if online.dtype == np.float64 and offline.dtype == np.float64 and len(rows):
            apart = np.abs(online[rows] - offline[rows])
            apart = apart[~np.isnan(apart)]
            if len(apart):
                self._largest = max(float(apart.max()), self._largest or 0.0)
        for row in rows[: _EXAMPLES - len(self._examples)].tolist():
            self._examples.append(
                Difference(
                    id=batch["id"][row].as_py(),
                    time=batch[TIME][row].as_py(),
                    online=_plain(online[row]),
                    offline=_plain(offline[row]),
                )
            )

    def result(self) -> FeatureParity:
        return FeatureParity(
            feature=self._feature,
            rows=self._rows,
            different=self._different,
            largest=self._largest,
            examples=tuple(self._examples),
        )


def differ(online: NDArray[Any], offline: NDArray[Any], tolerance: float) -> NDArray[np.bool_]:
    """Return which values differ, bool [n].

    ``tolerance`` is relative to the larger of two finite numbers; an infinite one is near no other.
    """
    if online.dtype == object or offline.dtype == object:
        pairs = zip(online.tolist(), offline.tolist(), strict=True)
        return np.array([_text(a) != _text(b) for a, b in pairs], np.bool_)
    same = online.view(np.int64) == offline.view(np.int64)
    same |= np.isnan(online) & np.isnan(offline)
    if tolerance:
        finite = np.isfinite(online) & np.isfinite(offline)
        one, other = online[finite], offline[finite]
        same[finite] |= np.abs(one - other) <= tolerance * np.maximum(np.abs(one), np.abs(other))
    return np.asarray(~same, np.bool_)


def _text(value: Any) -> Any:
    return None if value is None or value != value else value


def _plain(value: Any) -> float | str | None:
    if value is None or value != value:
        return None
    return value if isinstance(value, str) else float(value)
