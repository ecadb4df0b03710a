"""Functions for the graphs of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np

Columns = dict[str, Any]

NUMBER = 3


def doubled(columns: Columns) -> Columns:
    return columns | {"amount": columns["amount"] * 2}


def added(columns: Columns) -> Columns:
    columns["amount"] = columns["amount"] + 1
    return columns


def shorter(columns: Columns) -> Columns:
    return {name: values[:-1] for name, values in columns.items()}


def no_columns(columns: Columns) -> Any:
    return list(columns)


def halved(scores: Any, columns: Columns) -> Any:
    return scores / 2


def raised_by_amount(scores: Any, columns: Columns) -> Any:
    return np.where(columns["amount"] > 100, 1.0, scores)


def logits(scores: Any, columns: Columns) -> Any:
    return np.log(scores) - np.log1p(-scores)


def one_score(scores: Any, columns: Columns) -> Any:
    return scores.mean()


def picky(scores: Any, columns: Columns) -> Any:
    if np.isnan(columns["amount"]).any():
        raise KeyError("no amount")
    return scores


def whole_scores_above_a_hundred(scores: Any, columns: Columns) -> Any:
    return np.where(columns["amount"] > 100, 100.0, scores)
