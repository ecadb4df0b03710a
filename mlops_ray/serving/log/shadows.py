"""What models in shadow say of rows that were answered: asked beside the write, which waits little."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlops_ray.serving.models.loading import Columns, LoadedModel
from mlops_ray.serving.models.served import ModelSpec

_REST_S = 60.0
"""For so long a shadow is not asked that was late."""

logger = logging.getLogger(__name__)

Scores = NDArray[np.float64]


class Shadows:
    """Asks models in shadow, each in a thread of its own, all at the same time.

    One that is late is not waited for again for a minute, and not before it has come to its end: a
    write waits at most ``patience_s`` for it, once in a while.

    Args:
        patience_s: How long the rows wait for their scores.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._failed: set[ModelSpec] = set()
        self._late: dict[ModelSpec, tuple[Future[Scores], float]] = {}

    def scores(
        self, shadows: Sequence[LoadedModel], model: LoadedModel, columns: Columns, scores: Scores
    ) -> dict[str, pa.Array]:
        """Return the scores of each shadow by alias, float64 [n]; nulls for one that fails or is late.

        ``scores`` are those of ``model``, which answered.
        """
        deadline_s = time.monotonic() + self._patience_s
        asked = {
            shadow.spec: _begin(shadow, columns)
            for shadow in shadows
            if shadow.scorer is not model.scorer and self._may_be_asked(shadow.spec)
        }
        found: dict[str, pa.Array] = {}
        for shadow in shadows:
            values: Scores | None = scores
            if shadow.scorer is not model.scorer:
                future = asked.get(shadow.spec)
                values = (
                    None
                    if future is None
                    else self._outcome(shadow.spec, future, len(scores), deadline_s)
                )
            found[shadow.spec.alias] = (
                pa.nulls(len(scores), pa.float64()) if values is None else pa.array(values)
            )
        return found

    def _may_be_asked(self, spec: ModelSpec) -> bool:
        future, again_s = self._late.get(spec, (None, 0.0))
        if future is not None and (not future.done() or time.monotonic() < again_s):
            return False
        self._late.pop(spec, None)
        return True

    def _outcome(
        self, spec: ModelSpec, future: Future[Scores], rows: int, deadline_s: float
    ) -> Scores | None:
        try:
            values = np.asarray(future.result(max(0.0, deadline_s - time.monotonic())), np.float64)
            if values.shape != (rows,):
                raise ValueError(f"{values.shape} scores for {rows} rows")
            return values
        except Exception as error:
            if isinstance(error, TimeoutError) and not future.done():
                self._late[spec] = (future, time.monotonic() + _REST_S)
                logger.warning(
                    "version %d in shadow takes longer than %g s; it is asked again in %g s",
                    spec.version,
                    self._patience_s,
                    _REST_S,
                )
            elif spec not in self._failed:
                self._failed.add(spec)
                logger.exception("version %d fails in shadow", spec.version)
            return None


def _begin(shadow: LoadedModel, columns: Columns) -> Future[Scores]:
    """Ask in a thread that keeps nobody from ending: a model may hang for ever."""
    future: Future[Scores] = Future()

    def ask() -> None:
        try:
            future.set_result(shadow.scorer.predict(columns))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=ask, name=f"shadow-{shadow.spec.alias}", daemon=True).start()
    return future
