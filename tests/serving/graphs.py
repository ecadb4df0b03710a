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


def made(columns: Columns) -> Columns:
    return columns | {"moon_phase": np.ones(len(columns["amount"]))}


def made_text(columns: Columns) -> Columns:
    return columns | {"moon_phase": np.array(["full"] * len(columns["amount"]), dtype=object)}


def in_place(columns: Columns) -> Columns:
    columns["amount"] *= 2
    return columns


def scores_in_place(scores: Any, columns: Columns) -> Any:
    scores /= 2
    return scores


def columns_in_place(scores: Any, columns: Columns) -> Any:
    columns["amount"][:] = 0
    return scores


def strided(scores: Any, columns: Columns) -> Any:
    return np.stack([scores, 1 - scores], axis=1)[:, 0]


def right_for_one_row(scores: Any, columns: Columns) -> Any:
    return scores[:1]
