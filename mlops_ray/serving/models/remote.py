"""A model in processes of its own: what serves it there, and what stands for it in the endpoint."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlops_ray.errors import ServingError
from mlops_ray.serving.models.scorer import Columns, ModelGoneError, Scorer, Scores

KEPT_PACKAGES = 2
"""Packages that a process holds: the one in use, and the one before or after it."""

MERGED_ROWS = 4096

REFUSED_S = 5.0
"""How long a package that could not be loaded is not tried again."""

_REMEMBERED_REFUSALS = 64

_PROBE_TIMEOUT_S = 120.0


class RemoteScorer:
    """Scores by the deployment that holds the package; only the model's features travel.

    Args:
        handle: Serve's handle of a deployment of ``ModelServer``.
        path: The package.
        features: The columns that the model reads.
    """

    def __init__(self, handle: Any, path: str, features: Sequence[str]) -> None:
        if not handle.is_initialized:
            # Threads call it too, which a router in the endpoint's own event loop could not serve.
            handle._init(_run_router_in_separate_loop=True)
        self._score = handle.score
        self._path = path
        self._features = tuple(features)

    def predict(self, columns: Columns) -> Scores:
        """Return the scores, while this thread waits.

        Raises:
            ServingError: The model failed; ModelGoneError: its process did not answer.
        """
        try:
            scores = self._call(columns).result(timeout_s=_PROBE_TIMEOUT_S)
            return _checked(scores, self._rows(columns))
        except Exception as error:
            raise self._failed(error) from error

    async def apredict(self, columns: Columns) -> Scores:
        """Return the scores, while the event loop goes on; raises what ``predict`` raises."""
        try:
            return _checked(await self._call(columns), self._rows(columns))
        except Exception as error:
            raise self._failed(error) from error

    def _call(self, columns: Columns) -> Any:
        return self._score.remote(self._path, {name: columns[name] for name in self._features})

    def _rows(self, columns: Columns) -> int:
        return len(columns[self._features[0]])

    def _failed(self, error: Exception) -> ServingError:
        from ray.exceptions import RayTaskError

        cause = getattr(error, "cause", None) or error
        # What the process raised is wrapped in a RayTaskError; the rest is about the process.
        kind = ServingError if isinstance(error, RayTaskError) else ModelGoneError
        return kind(
            "the model in another process did not score",
            where=self._path,
            why=str(cause) or type(cause).__name__,
            fix="see the log of that process, and whether its deployment runs",
        )


class ModelServer:
    """Scores for endpoints: a plain class for a Serve deployment that only handles call.

    Calls that are there at the same time are scored together, in a thread, so that the process
    answers its health checks meanwhile. A package that is asked for is loaded if it is not held, so
    endpoints and this may change versions in any order; the two that were used last are held. One
    that cannot be loaded is not tried again for some seconds, and takes nobody's place.
    """

    def __init__(
        self,
        *,
        gpu: bool = False,
        load: Callable[[str], Scorer] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gpu = gpu
        self._load = load or self._predictor
        self._clock_s = clock_s
        self._lanes: OrderedDict[str, asyncio.Task[_Lane]] = OrderedDict()
        self._refused: OrderedDict[str, _Refusal] = OrderedDict()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Load the packages at ``user_config["paths"]`` ahead of the first call.

        One that cannot be loaded is an error for those who ask for it, not for this process.
        """
        waiting = [self._lane(path) for path in user_config.get("paths", ())]
        await asyncio.gather(*waiting, return_exceptions=True)

    async def score(self, path: str, columns: Columns) -> Scores:
        """Return the scores, float64 [n], that the package at ``path`` gives to feature columns.

        Raises:
            ArtifactError: There is no readable package.
            MlopsRayError: It cannot be loaded, or does not score.
        """
        lane = await self._lane(path)
        return await lane.score(columns)

    async def _lane(self, path: str) -> _Lane:
        refusal = self._refused.get(path)
        if refusal is not None and self._clock_s() < refusal.until_s:
            raise refusal.error.with_traceback(None)
        task = self._lanes.get(path)
        if task is None:
            task = self._lanes[path] = asyncio.create_task(self._open(path))
        self._lanes.move_to_end(path)
        # Others wait for the same task: a caller that gives up must not end it.
        return await asyncio.shield(task)

    async def _open(self, path: str) -> _Lane:
        try:
            lane = _Lane(await asyncio.to_thread(self._load, path))
        except Exception as error:
            self._lanes.pop(path, None)
            self._refuse(path, error)
            raise
        self._refused.pop(path, None)
        while len(self._lanes) > KEPT_PACKAGES:
            self._lanes.popitem(last=False)
        return lane

    def _refuse(self, path: str, error: Exception) -> None:
        self._refused[path] = _Refusal(error, self._clock_s() + REFUSED_S)
        self._refused.move_to_end(path)
        while len(self._refused) > _REMEMBERED_REFUSALS:
            self._refused.popitem(last=False)

    def _predictor(self, path: str) -> Scorer:
        from mlops_ray.metadata import package
        from mlops_ray.training.inference import Predictor

        return Predictor(package.read(Path(path)), fastest=True, gpu=self._gpu)


@dataclass(frozen=True, slots=True)
class _Refusal:
    error: Exception
    until_s: float


@dataclass(eq=False, slots=True)
class _Call:
    columns: Columns
    rows: int
    scores: asyncio.Future[Scores]


class _Lane:
    """One model and the calls that wait for it. One batch is scored at a time."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._calls: deque[_Call] = deque()
        self._working: asyncio.Task[None] | None = None

    async def score(self, columns: Columns) -> Scores:
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._calls.append(_Call(columns, len(next(iter(columns.values()))), future))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        try:
            while self._calls:
                await self._answer(self._take())
        finally:
            self._working = None

    def _take(self) -> list[_Call]:
        calls = [self._calls.popleft()]
        rows = calls[0].rows
        while self._calls and rows + self._calls[0].rows <= MERGED_ROWS:
            calls.append(self._calls.popleft())
            rows += calls[-1].rows
        return [call for call in calls if not call.scores.done()]

    async def _answer(self, calls: list[_Call]) -> None:
        if not calls:
            return
        try:
            scores = await asyncio.to_thread(self._scorer.predict, _merged(calls))
            _checked(scores, sum(call.rows for call in calls))
        except Exception as error:
            if len(calls) > 1:
                for call in calls:
                    await self._answer([call])
            elif not calls[0].scores.done():
                calls[0].scores.set_exception(error)
            return
        start = 0
        for call in calls:
            if not call.scores.done():
                call.scores.set_result(scores[start : start + call.rows])
            start += call.rows


def _checked(scores: Scores, rows: int) -> Scores:
    if np.shape(scores) != (rows,):
        raise ValueError(f"it gave scores of shape {np.shape(scores)} for {rows} rows")
    return scores


def _merged(calls: Sequence[_Call]) -> Columns:
    if len(calls) == 1:
        return calls[0].columns
    return {
        name: np.concatenate([call.columns[name] for call in calls]) for name in calls[0].columns
    }
