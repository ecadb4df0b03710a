"""Training sets with their manifests: made once, and made again, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.definitions import define
from mlops_ray.features.files import check_files
from mlops_ray.features.manifest import TrainingManifest, ViewPin, pinning, write_manifest
from mlops_ray.features.offline import OfflineStore
from mlops_ray.features.service import find_service, on_demand_views
from mlops_ray.features.training_set import (
    LabelCount,
    join_service,
    label_columns,
    labelled_rows,
)
from mlops_ray.metadata.types import FeatureVersions
from mlops_ray.orchestration.keys import code_digest


@dataclass(frozen=True)
class TrainingSet:
    """A training set, what became of the label source's rows, and what it was made from."""

    table: pa.Table
    count: LabelCount
    manifest: TrainingManifest


def make_training_set(
    features: Features,
    service: str,
    table: pa.Table,
    store: OfflineStore,
    versions: FeatureVersions,
    until: datetime | None,
    *,
    on_ray: bool | None = None,
) -> TrainingSet:
    """Make the training set of a service and store its manifest, which pins what it was made from.

    ``training_set.build_training_set`` says what it looks like.

    Raises:
        SchemaError: A column is missing or has the wrong type.
        FeatureStoreError: A view's table is not the one that ``versions`` names, or a vacuum deleted
            files of a version meanwhile.
    """
    pins = {
        view: _pin(features, view, store, versions)
        for view in find_service(features, service).views
    }
    rows, count = labelled_rows(table, features, until)
    result = join_service(features, service, rows, store, _versions(pins), on_ray=on_ray)
    manifest = TrainingManifest(
        service=service,
        labels=_digest_of_labels(features, service, rows),
        views=pins,
        until=until,
        known_only=features.offline.known_only,
        on_demand=_code_of(features, service),
        rows=result.num_rows,
        result=digest_table(result),
    )
    with pinning(store.root):
        _check_stored(pins, store)
        write_manifest(store.root, manifest)
    return TrainingSet(result, count, manifest)


def training_set_of(
    manifest: TrainingManifest,
    features: Features,
    table: pa.Table,
    store: OfflineStore,
    *,
    on_ray: bool | None = None,
) -> pa.Table:
    """Make a manifest's training set again: the same bytes, whatever happened to the store since.

    Args:
        manifest: What it was made from.
        features: The declarations, as they were then.
        table: The cleaned rows of the label source. Rows whose label became known later than the
            manifest's ``until`` may have come to it.
        store: The offline store.
        on_ray: Whether to join on the Ray cluster; see ``join_view``.

    Raises:
        FeatureStoreError: Something is not what it was: says what.
    """
    asked = find_service(features, manifest.service).views
    _compare("the service's list of views", [*asked], [*manifest.views])
    for view, pin in manifest.views.items():
        definition = define(features, view)
        _compare(f"the definition of view {view!r}", definition.digest, pin.definition)
        _compare(f"the TTL of view {view!r} in µs", definition.ttl_us, pin.ttl_us)
        _compare(f"the features of view {view!r}", _types(features, view), pin.features)
        if pin.version >= 0:
            _compare(f"the table of view {view!r}", store.table_id(view), pin.table)
    _compare("offline.known_only", features.offline.known_only, manifest.known_only)
    _compare(
        "the code of on-demand views", _code_of(features, manifest.service), manifest.on_demand
    )
    rows, _ = labelled_rows(table, features, manifest.until)
    _compare("the labels", _digest_of_labels(features, manifest.service, rows), manifest.labels)
    versions = _versions(manifest.views)
    result = join_service(features, manifest.service, rows, store, versions, on_ray=on_ray)
    _compare("the training set", digest_table(result), manifest.result)
    return result


def digest_table(table: pa.Table) -> str:
    """Return the BLAKE2b-256 digest of a table's names, types and values, NaN's bits among them.

    How it is cut into chunks and what lies behind nulls does not count.
    """
    state = hashlib.blake2b(digest_size=32)
    for field, column in zip(table.schema, table.columns, strict=True):
        state.update(f"{field.name}:{field.type}:{len(column)};".encode())
        state.update(np.packbits(column.is_valid().to_numpy(), bitorder="little").data)
        for part in _parts(column.drop_null()):
            state.update(np.ascontiguousarray(part).data)
    return state.hexdigest()


def _parts(values: pa.ChunkedArray) -> list[NDArray[Any]]:
    """Return the bytes of values without nulls: of texts their lengths and letters."""
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.int64())
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return [values.to_numpy()]
    texts = values.cast(pa.string()).cast(pa.large_binary()).combine_chunks()
    lengths = np.asarray(pc.binary_length(texts).to_numpy(), np.int64)
    return [lengths, np.frombuffer(b"".join(texts.to_pylist()), np.uint8)]


def _check_stored(pins: Mapping[str, ViewPin], store: OfflineStore) -> None:
    """Make sure that what the training set was made from is there, so that a pin keeps it."""
    for view, pin in pins.items():
        if pin.version >= 0:
            _compare(f"the table of view {view!r}", store.table_id(view), pin.table)
            check_files(store.path(view), store.files(view, pin.version))


def _types(features: Features, view: str) -> dict[str, str]:
    return dict(features.views[view].features)


def _pin(features: Features, view: str, store: OfflineStore, versions: FeatureVersions) -> ViewPin:
    table = store.table_id(view)
    if view in versions.tables:
        _compare(f"the table of view {view!r}", table, versions.tables[view])
    version = versions.versions.get(view, store.version(view))
    definition = define(features, view)
    return ViewPin(
        definition=definition.digest,
        table=table,
        version=version,
        generation="" if version < 0 else store.generation(view, version),
        ttl_us=definition.ttl_us,
        features=_types(features, view),
    )


def _versions(pins: Mapping[str, ViewPin]) -> dict[str, int]:
    return {view: pin.version for view, pin in pins.items()}


def _digest_of_labels(features: Features, service: str, rows: pa.Table) -> str:
    return digest_table(pa.table(label_columns(features, service, rows)))


def _code_of(features: Features, service: str) -> str:
    targets = [view.function for view in on_demand_views(features, service)]
    if not targets:
        return ""
    return code_digest(
        targets[0], targets, sorted({target.partition(".")[0] for target in targets})
    )


def _compare(what: str, now: object, then: object) -> None:
    if now != then:
        raise FeatureStoreError(
            f"{what} is not what it was when the training set was made",
            why=f"then {then}, now {now}",
            fix="use the configuration, code and data of that time",
        )
