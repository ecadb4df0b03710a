"""What makes a view's stored rows what they are, and how they are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from mlops_ray.config.features import Features, FeatureView
from mlops_ray.errors import FeatureStoreError
from mlops_ray.features.columns import INSTANT, KEY_TYPES, duration_us
from mlops_ray.metadata.digest import digest_json

EVENT_TIME = "event_time"
CREATED_TIME = "created_time"


@dataclass(frozen=True)
class ViewDefinition:
    """A view with its entity's keys.

    ``digest`` covers all that decides the content of its rows: the view, its keys and its source;
    not the TTL, which acts on reading, nor descriptions. A view that is declared anew therefore has
    new tables, and never rows of two kinds in one.
    """

    name: str
    view: FeatureView
    keys: dict[str, str]
    digest: str

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the features, in storage order."""
        return self.view.feature_names

    @property
    def ttl_us(self) -> int | None:
        """How old a row may be to be used, in µs."""
        return None if self.view.ttl is None else duration_us(self.view.ttl)

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of stored rows: keys, event time, created time, features."""
        keys = [pa.field(name, KEY_TYPES[dtype]) for name, dtype in self.keys.items()]
        times = [pa.field(EVENT_TIME, INSTANT), pa.field(CREATED_TIME, INSTANT)]
        return pa.schema(keys + times + [pa.field(n, pa.float64()) for n in self.feature_names])


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
    content = {
        "view": view.model_dump(mode="json", exclude={"ttl", "description"}),
        "keys": list(keys.items()),
        "source": features.sources[view.source].model_dump(
            mode="json", exclude={"expectations", "description"}
        ),
    }
    return ViewDefinition(name, view, keys, digest_json(content))
