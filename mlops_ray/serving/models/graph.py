"""A graph of functions and models that answers like one model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mlops_ray.config.serving import Graph
from mlops_ray.config.targets import load
from mlops_ray.errors import ServingError
from mlops_ray.serving.models.scorer import AsyncScorer, Columns, Scorer, Scores

Before = Callable[[Columns], Columns]
After = Callable[[NDArray[Any], Columns], NDArray[Any]]


class GraphFunctions:
    """The functions of a graph, imported. Their arrays are read-only: others read them as well.

    Raises:
        MlopsRayError: One is not on the allow-list, or cannot be imported.
        ServingError: One is no function.
    """

    def __init__(self, graph: Graph) -> None:
        self._before: list[tuple[str, Before]] = [(name, _load(name)) for name in graph.before]
        self._after: list[tuple[str, After]] = [(name, _load(name)) for name in graph.after]

    def __bool__(self) -> bool:
        return bool(self._before or self._after)

    def prepare(self, columns: Columns) -> Columns:
        """Return what models are to score of the endpoint's feature columns, which stay as they are.

        Raises:
            ServingError: A function gave something other than as many rows of columns.
        """
        rows = _rows(columns)
        for name, function in self._before:
            columns = function(_read_only(columns))
            if not isinstance(columns, Mapping) or any(
                np.shape(c) != rows for c in columns.values()
            ):
                raise ServingError(
                    f"{name} gave no columns of {rows[0]} rows each",
                    where="serving.graph.before",
                    fix="return a dict of arrays, one value for each row",
                )
        return columns

    def finish(self, scores: Scores, columns: Columns) -> Scores:
        """Return the final scores, contiguous; ``columns`` are those that the models scored.

        Raises:
            ServingError: A function gave something other than as many scores in [0, 1].
        """
        for name, function in self._after:
            given = function(_view(scores), _read_only(columns))
            # Answers are written from memory without gaps.
            found = np.asarray(given, dtype=np.float64, order="C")
            if found.shape != scores.shape or not ((found >= 0) & (found <= 1)).all():
                raise ServingError(
                    f"{name} gave no {len(scores)} scores between 0 and 1",
                    where="serving.graph.after",
                    fix="return an array with one score for each row",
                )
            scores = found
        return scores


class GraphScorer:
    """Prepares columns, takes the mean of several models' scores by weight, and finishes them."""

    def __init__(self, functions: GraphFunctions, members: Sequence[tuple[Scorer, float]]) -> None:
        total = sum(weight for _, weight in members)
        self._functions = functions
        self._members = [(scorer, weight / total) for scorer, weight in members]

    def predict(self, columns: Columns) -> Scores:
        """Return one score in [0, 1] for each row of the feature columns."""
        prepared = self._functions.prepare(columns)
        found = [scorer.predict(prepared) for scorer, _ in self._members]
        return self._functions.finish(self._mean(found), prepared)

    def _mean(self, found: Sequence[Scores]) -> Scores:
        if len(found) == 1:
            return found[0]
        mean = np.zeros(len(found[0]))
        for scores, (_, weight) in zip(found, self._members, strict=True):
            mean += weight * scores
        # The weights' sum can be 1 plus a rounding error.
        return np.minimum(mean, 1.0)


class AsyncGraphScorer(GraphScorer):
    """The same where some of the models are in other processes, which then score at one time."""

    def __init__(self, functions: GraphFunctions, members: Sequence[tuple[Scorer, float]]) -> None:
        super().__init__(functions, members)
        self._scores = [_awaited(scorer) for scorer, _ in members]

    async def apredict(self, columns: Columns) -> Scores:
        """Return what ``predict`` returns, while the event loop goes on."""
        prepared = self._functions.prepare(columns)
        found = await asyncio.gather(*(score(prepared) for score in self._scores))
        return self._functions.finish(self._mean(found), prepared)


def _awaited(scorer: Scorer) -> Callable[[Columns], Awaitable[Scores]]:
    if isinstance(scorer, AsyncScorer):
        return scorer.apredict

    async def score(columns: Columns) -> Scores:
        return scorer.predict(columns)

    return score


def _load(name: str) -> Callable[..., Any]:
    function = load(name)
    if not callable(function):
        raise ServingError(f"{name} is no function", where="serving.graph")
    return cast(Callable[..., Any], function)


def _read_only(columns: Columns) -> Columns:
    return {name: _view(np.asarray(values)) for name, values in columns.items()}


def _view(values: NDArray[Any]) -> NDArray[Any]:
    view = values.view()
    view.flags.writeable = False
    return view


def _rows(columns: Columns) -> tuple[int]:
    return (len(next(iter(columns.values()))),)
