"""What makes a view's stored rows what they are, and how they are laid out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from mlops_ray.config.features import DType, Features, FeatureView, Source
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import INSTANT, KEY_TYPES, duration_us
from mlops_ray.metadata.digest import digest_json

EVENT_TIME = "event_time"
CREATED_TIME = "created_time"

ARROW_TYPES: dict[DType, pa.DataType] = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": INSTANT,
}
_TOLD_ONLY = {"description", "owner", "tags"}
_SECRET = re.compile("password|secret|token|credential|access.?key|account.?key|api.?key", re.I)
_USER = re.compile(r"://[^/@\s]+@")


@dataclass(frozen=True)
class ViewDefinition:
    """A view with its entity's keys.

    ``digest`` covers all that decides the content of its rows: the view, its keys and what it is made
    from; not the TTL, which acts on reading, nor what is only told to people. Of a view without
    windows it leaves out the columns: they may be added to, and older rows then have nulls. Anything
    else that is declared anew makes a view of new tables, and never rows of two kinds in one.
    """

    name: str
    view: FeatureView
    keys: dict[str, str]
    digest: str

    @property
    def features(self) -> dict[str, DType]:
        """The features and their types, in declared order."""
        return self.view.features

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the features, in declared order."""
        return self.view.feature_names

    @property
    def ttl_us(self) -> int | None:
        """How old a row may be to be used, in µs."""
        return None if self.view.ttl is None else duration_us(self.view.ttl)

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of feature rows: keys, event time, created time, features."""
        keys = [pa.field(name, KEY_TYPES[dtype]) for name, dtype in self.keys.items()]
        times = [pa.field(EVENT_TIME, INSTANT), pa.field(CREATED_TIME, INSTANT)]
        features = [pa.field(name, ARROW_TYPES[dtype]) for name, dtype in self.features.items()]
        return pa.schema(keys + times + features)


def define(features: Features, name: str) -> ViewDefinition:
    """Return the definition of a view.

    Raises:
        FeatureStoreError: There is no view of that name, or a feature of it has the name of a key.
    """
    if name not in features.views:
        raise FeatureStoreError(
            f"there is no feature view {name!r}", fix=f"known views: {', '.join(features.views)}"
        )
    view = features.views[name]
    keys: dict[str, str] = dict(features.entities[view.entity].keys)
    taken = {*keys, EVENT_TIME, CREATED_TIME} & set(view.feature_names)
    if taken:
        raise FeatureStoreError(
            f"features may not be called {', '.join(sorted(taken))}",
            where=f"features.views.{name}",
            fix="rename the columns in the source's clean function",
        )
    return ViewDefinition(name, view, keys, digest_json(content_of(features, name)))


def content_of(features: Features, name: str) -> dict[str, Any]:
    """Return all that a view's digest covers, as a JSON value."""
    view = features.views[name]
    told = _TOLD_ONLY | {"ttl", "freshness"} | (set() if view.windows else {"columns"})
    return {
        "view": view.model_dump(mode="json", exclude=told),
        "keys": list(features.entities[view.entity].keys.items()),
        "origin": _origin(features, view),
    }


def source_of(features: Features, name: str) -> Source:
    """Return the source that a view is made from in the end, over other views if need be."""
    view = features.views[name]
    while view.view is not None:
        view = features.views[view.view]
    assert view.source is not None
    return features.sources[view.source]


def _origin(features: Features, view: FeatureView) -> Any:
    if view.view is not None:
        return define(features, view.view).digest
    assert view.source is not None
    source = features.sources[view.source]
    return without_secrets(source.model_dump(mode="json", exclude=_TOLD_ONLY | {"expectations"}))


def without_secrets(value: Any) -> Any:
    """Return a JSON value with passwords and keys masked: they open a source and make no row."""
    if isinstance(value, dict):
        return {
            name: "***" if _SECRET.search(name) and isinstance(item, str) else without_secrets(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return _USER.sub("://", value) if isinstance(value, str) else value
