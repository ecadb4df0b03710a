"""The request path of features: keys and request facts in, all the columns of a model out."""

from __future__ import annotations

import numpy as np

from mlops_ray.config.features import Features
from mlops_ray.features.online import OnlineStore
from mlops_ray.features.online.reader import Reads
from mlops_ray.features.service import (
    Columns,
    feature_columns,
    find_service,
    on_demand_features,
)


class OnlineLookup:
    """Looks up a service's features for requests.

    Args:
        features: The declarations.
        service: The service's name.
        store: The online store, open for reading.

    Raises:
        FeatureStoreError: There is no such service, or its inputs do not fit its views.
        MlopsRayError: The request function cannot be imported.
    """

    def __init__(self, features: Features, service: str, store: OnlineStore) -> None:
        declared = find_service(features, service)
        self._time = declared.time
        self._on_demand = on_demand_features(features, service)
        numeric, categorical = feature_columns(features, service)
        self._order = (*numeric, *categorical)
        self._keys = [
            tuple(features.entities[features.views[v].entity].keys) for v in declared.views
        ]
        self._reader = store.reader(declared.views) if declared.views else None

    @property
    def keys(self) -> tuple[str, ...]:
        """The inputs that are entity keys, each once."""
        return tuple(dict.fromkeys(key for names in self._keys for key in names))

    @property
    def degraded(self) -> str:
        """What this thread's last call did without the store: ``missing``, ``stale``, or nothing."""
        return "" if self._reader is None else self._reader.degraded

    @property
    def is_gone(self) -> bool:
        """Whether the store did not answer when it was last asked: the next call may take long."""
        return self._reader is not None and self._reader.is_gone

    @property
    def reads(self) -> dict[str, Reads]:
        """What was read of each view so far."""
        return {} if self._reader is None else self._reader.reads

    def __call__(self, inputs: Columns) -> Columns:
        """Return every feature column of the service, numeric ones first, in the model's order.

        Args:
            inputs: The service's inputs by name, arrays [n] as ``service.inputs_of`` describes them.

        Returns:
            float64 [n] for numeric features, NaN where the store has no row that may be used at the
            request's time, or a null; object arrays of ``str`` for categorical ones, with None there.
        """
        at_us = inputs[self._time].astype("datetime64[us]", copy=False).view(np.int64)
        columns: Columns = {}
        if self._reader is not None:
            keys = [[inputs[key] for key in names] for names in self._keys]
            columns.update(self._reader.read_columns(keys, at_us))
        columns.update(self._on_demand(inputs, columns))
        return {name: columns[name] for name in self._order}
