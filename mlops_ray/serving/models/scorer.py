"""What the endpoint asks of a model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]
Scores = NDArray[np.float64]


class Scorer(Protocol):
    """Scores rows."""

    def predict(self, columns: Columns) -> Scores:
        """Return one score in [0, 1] for each row of the feature columns."""


@runtime_checkable
class AsyncScorer(Scorer, Protocol):
    """A scorer that waits for another process; its ``predict`` blocks, so it is for threads."""

    async def apredict(self, columns: Columns) -> Scores:
        """Return what ``predict`` returns, while the event loop goes on."""
