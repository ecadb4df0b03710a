"""The request path of features: keys and request facts in, all the columns of a model out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.features import Features
from mlops_ray.features.matrix import FeatureMatrix
from mlops_ray.features.online import OnlineStore
from mlops_ray.features.online.reader import Reads
from mlops_ray.features.service import (
    Inputs,
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
        self._numeric, self._categorical = feature_columns(features, service)
        self._keys = [
            tuple(features.entities[features.views[v].entity].keys) for v in declared.views
        ]
        self._reader = store.reader(declared.views) if declared.views else None
        # Those of the views come first, in the reader's order.
        stored = 0 if self._reader is None else len(self._reader.numeric_names)
        self._made = list(enumerate(self._numeric))[stored:]

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

    def __call__(self, inputs: Inputs) -> FeatureMatrix:
        """Return every feature column of the service, numeric ones first, in the model's order.

        Args:
            inputs: The service's inputs by name, arrays [n] as ``service.inputs_of`` describes them.

        Returns:
            float64 [n] for numeric features, NaN where the store has no row that may be used at the
            request's time, or a null; object arrays of ``str`` for categorical ones, with None there.
        """
        at_us = inputs[self._time].astype("datetime64[us]", copy=False).view(np.int64)
        stored = self._read(inputs, at_us)
        made = self._on_demand(inputs, stored)
        others = {n: stored[n] if n in stored.others else made[n] for n in self._categorical}
        known = len(stored.numeric)
        if known == len(self._numeric):
            return FeatureMatrix(self._numeric, stored.matrix, others)
        matrix = np.empty((len(at_us), len(self._numeric)))
        matrix[:, :known] = stored.matrix
        for place, name in self._made:
            matrix[:, place] = made[name]
        return FeatureMatrix(self._numeric, matrix, others)

    def _read(self, inputs: Inputs, at_us: NDArray[np.int64]) -> FeatureMatrix:
        if self._reader is None:
            return FeatureMatrix((), np.empty((len(at_us), 0)), {})
        keys = [[inputs[key] for key in names] for names in self._keys]
        return self._reader.read_columns(keys, at_us)
