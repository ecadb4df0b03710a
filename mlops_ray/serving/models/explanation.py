"""What each feature adds to a score: Shapley values against one baseline row.

The players are the features, and the worth of a coalition is the logit of the score of a row that
has its own values for the features in the coalition and the baseline's for all others (the baseline
Shapley value: Sundararajan and Najmi, "The many Shapley values for model explanation", ICML 2020).
Any model that gives scores can be explained so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlops_ray.errors import RequestError
from mlops_ray.metadata.package import EncoderSpec
from mlops_ray.metadata.profile import CategoricalBins, Reference

Columns = Mapping[str, NDArray[Any]]
Scores = NDArray[np.float64]
Value = float | str | None

EXACT_FEATURES = 10
"""Up to so many features all coalitions are scored, and the values are exact."""

ORDERS = 32
"""With more features: orders in which features are added, each second one another's reverse."""

MAX_EVALUATIONS = 200_000
"""Rows × coalitions that one call may score."""

_BLOCK_ROWS = 16_384
_SEED = 20_260
_EPSILON = 2.0**-52


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why rows got their scores. In each row, ``base`` and all contributions add up to its logit.

    ``base`` is the logit of the baseline's score; ``contributions`` [n] by feature are differences
    of logits; ``scores`` are the rows' own, in [0, 1].
    """

    base: float
    contributions: dict[str, Scores]
    scores: Scores


class Explainer:
    """Explains the scores of one model. The same row gets the same explanation, whatever is beside it.

    Exact for at most ten features. For more, the mean over orders in which features are added, each
    with its reverse, drawn once with a fixed seed (sampling of orders: Castro, Gómez and Tejada,
    Computers & Operations Research 36, 2009; antithetic pairs: Mitchell, Cooper, Frank and Holmes,
    JMLR 23, 2022); without interactions between features that is exact too.

    Args:
        predict: The model: columns to scores in [0, 1].
        baseline: A value for every column that ``predict`` reads; its names are the players.
        orders: An even number.
        max_evaluations: Bounds the work of one call.
    """

    def __init__(
        self,
        predict: Callable[[Columns], Scores],
        baseline: Mapping[str, Value],
        *,
        orders: int = ORDERS,
        max_evaluations: int = MAX_EVALUATIONS,
    ) -> None:
        self._predict = predict
        self._baseline = {name: _single(value) for name, value in baseline.items()}
        self._orders = orders
        self._max_evaluations = max_evaluations

    @property
    def max_rows(self) -> int:
        """How many rows one call may explain."""
        return max(1, self._max_evaluations // len(self._game().masks))

    def explain(self, columns: Columns) -> Explanation:
        """Explain the rows of ``columns``, arrays [n] with the names of the baseline among them.

        Raises:
            RequestError: 413, more than ``max_rows`` rows.
        """
        game = self._game()
        own = {name: columns[name] for name in self._baseline}
        rows = len(next(iter(own.values())))
        if rows > self.max_rows:
            raise RequestError(
                f"{rows} rows are too many to explain at once; send {self.max_rows}", status=413
            )
        scores = self._predict(columns)
        worth = np.empty((len(game.masks), rows))
        worth[0] = base = float(_logit(self._predict(self._baseline))[0])
        worth[-1] = _logit(scores)
        self._fill(worth, game.masks, own)
        values = game.weights @ worth
        return Explanation(base, dict(zip(own, values, strict=True)), scores)

    def _game(self) -> _Game:
        return _game(len(self._baseline), self._orders)

    def _fill(self, worth: Scores, masks: NDArray[np.bool_], own: Columns) -> None:
        """Score all coalitions but the first (nobody) and the last (everybody)."""
        rows = worth.shape[1]
        step = max(1, _BLOCK_ROWS // rows)
        for start in range(1, len(masks) - 1, step):
            chosen = masks[start : min(start + step, len(masks) - 1)]
            mixed = {
                name: np.where(chosen[:, place, None], own[name], self._baseline[name]).ravel()
                for place, name in enumerate(own)
            }
            found = _logit(self._predict(mixed))
            worth[start : start + len(chosen)] = found.reshape(len(chosen), rows)


def baseline_of(encoder: EncoderSpec, reference: Reference) -> dict[str, Value]:
    """Return the baseline of a model: the means of its numeric features in training, and the most
    frequent value there of each categorical one."""
    values: dict[str, Value] = dict(zip(encoder.numeric, encoder.means, strict=True))
    for name in encoder.categorical:
        bins = reference.bins.get(name)
        known = bins.values if isinstance(bins, CategoricalBins) else ()
        values[name] = known[0] if known else None
    return values


@dataclass(frozen=True, eq=False)
class _Game:
    """Which coalitions are scored, and how the values follow from their worths.

    ``masks`` [c, d] say who is in a coalition, the empty one first and the whole one last;
    ``weights`` [d, c] turn worths [c, n] into values [d, n].
    """

    masks: NDArray[np.bool_]
    weights: NDArray[np.float64]


@lru_cache(maxsize=2)
def _game(players: int, orders: int) -> _Game:
    return _all_coalitions(players) if players <= EXACT_FEATURES else _sampled(players, orders)


def _all_coalitions(players: int) -> _Game:
    """The definition (Shapley 1953): each marginal contribution, weighted by |S|!(d-|S|-1)!/d!."""
    numbers = np.arange(1 << players)
    masks = (numbers[:, None] >> np.arange(players)) & 1 == 1
    share = np.array(
        [factorial(s) * factorial(players - s - 1) / factorial(players) for s in range(players)]
    )
    weights = np.zeros((players, len(numbers)))
    for player in range(players):
        without = numbers[~masks[:, player]]
        marginal = share[masks[without].sum(axis=1)]
        weights[player, without] = -marginal
        weights[player, without | (1 << player)] = marginal
    return _Game(masks, weights)


def _sampled(players: int, orders: int) -> _Game:
    """The mean of the marginal contributions along the orders; coalitions met twice count once."""
    random = np.random.default_rng(_SEED)
    drawn = [random.permutation(players) for _ in range(orders // 2)]
    walks = [walk for order in drawn for walk in (order, order[::-1])]
    steps: dict[bytes, int] = {}
    masks: list[NDArray[np.bool_]] = []
    moves: list[tuple[int, int, int]] = []

    def place_of(mask: NDArray[np.bool_]) -> int:
        place = steps.setdefault(mask.tobytes(), len(masks))
        if place == len(masks):
            masks.append(mask.copy())
        return place

    for walk in walks:
        mask = np.zeros(players, dtype=np.bool_)
        before = place_of(mask)
        for player in walk.tolist():
            mask[player] = True
            after = place_of(mask)
            moves.append((player, before, after))
            before = after
    weights = np.zeros((players, len(masks)))
    for player, before, after in moves:
        weights[player, before] -= 1 / len(walks)
        weights[player, after] += 1 / len(walks)
    everybody = steps[np.ones(players, dtype=np.bool_).tobytes()]
    order = [*(p for p in range(len(masks)) if p != everybody), everybody]
    return _Game(np.array(masks)[order], weights[:, order])


def _single(value: Value) -> NDArray[Any]:
    if isinstance(value, float):
        return np.array([value])
    return np.array([value], dtype=object)


def _logit(scores: Scores) -> Scores:
    """The logit; scores closer than 2^-52 to 0 or 1 count as being that far away."""
    inside = np.clip(scores, _EPSILON, 1 - _EPSILON)
    logits: Scores = np.log(inside) - np.log1p(-inside)
    return logits
