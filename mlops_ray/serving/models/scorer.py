"""What the endpoint asks of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mlops_ray.errors import ServingError

Columns = Mapping[str, NDArray[Any]]
Scores = NDArray[np.float64]


class ModelGoneError(ServingError):
    """The process that holds a model does not answer. What a model raises is no such error."""


class Scorer(Protocol):
    """Scores rows."""

    def predict(self, columns: Columns) -> Scores:
        """Return one score in [0, 1] for each row of the feature columns."""


@runtime_checkable
class AsyncScorer(Scorer, Protocol):
    """A scorer that waits for another process; its ``predict`` blocks, so it is for threads."""

    async def apredict(self, columns: Columns) -> Scores:
        """Return what ``predict`` returns, while the event loop goes on.

        Raises:
            ModelGoneError: The other process is not there, or has ended.
        """
