"""Statistics that compare two distributions, given as counts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

SMOOTHING = 0.5

Counts = NDArray[np.int64]


def psi(reference: ArrayLike, live: ArrayLike, *, smoothing: float = SMOOTHING) -> float:
    """Return the population stability index of ``live`` against ``reference``; 0 when they agree.

    PSI = Σ (qᵢ − pᵢ) · ln(qᵢ / pᵢ) over the cells i, where p and q are the shares of the reference
    and of the live rows in cell i (Siddiqi, *Credit Risk Scorecards*, 2006, ch. 8). It is the sum
    of both Kullback-Leibler divergences, hence symmetric and never negative. By custom .1 is worth
    a look and .2 a drift.

    Shares are taken after ``smoothing`` is added to each count, so that an empty cell gives a
    finite term: pᵢ = (nᵢ + s) / (N + s·k). Cells empty on both sides say nothing and are left out.
    With no rows on either side there is nothing to compare, and the result is 0.

    Args:
        reference: Rows in each cell (bins, missing, categories), [k], not negative.
        live: The same cells of the live rows, [k].
        smoothing: What is added to each count, > 0.

    Raises:
        ValueError: The two do not have the same cells, or a count is negative.
    """
    expected, observed = _cells(reference), _cells(live)
    if expected.shape != observed.shape:
        raise ValueError(f"reference has {expected.size} cells, live has {observed.size}")
    if not expected.any() or not observed.any():
        return 0.0
    used = (expected + observed) > 0
    p = _shares(expected[used], smoothing)
    q = _shares(observed[used], smoothing)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_noise(cells: int, reference_rows: int, live_rows: int) -> float:
    """Return the PSI to expect from sampling alone when nothing has drifted.

    PSI is then about χ²(k−1) · (1/N + 1/M), whose mean is (k−1) · (1/N + 1/M) (Yurdakul,
    *Statistical Properties of Population Stability Index*, 2018). Ten bins and 100 live rows
    already give .09: a threshold means little below a few hundred rows.
    """
    if min(reference_rows, live_rows) <= 0:
        return float("inf")
    return (cells - 1) * (1 / reference_rows + 1 / live_rows)


def psi_by_feature(
    reference: Mapping[str, ArrayLike], live: Mapping[str, ArrayLike]
) -> dict[str, float]:
    """Return the PSI of each feature that both sides have, in the reference's order."""
    return {name: psi(reference[name], live[name]) for name in reference if name in live}


def _cells(counts: ArrayLike) -> NDArray[np.float64]:
    cells = np.asarray(counts, dtype=np.float64).ravel()
    if cells.size and cells.min() < 0:
        raise ValueError("counts cannot be negative")
    return cells


def _shares(counts: NDArray[np.float64], smoothing: float) -> NDArray[np.float64]:
    smoothed = counts + smoothing
    return smoothed / smoothed.sum()
