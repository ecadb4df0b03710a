"""What an endpoint's answers become."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer: for each row its id, its score in [0, 1], the score against the threshold, and which
    model answered: its version, and its route, which is the alias it is deployed under.
    """

    ids: list[str]
    scores: list[float]
    labels: list[int]
    versions: list[int]
    routes: list[str]

    @property
    def version(self) -> int | None:
        """The version that answered all rows; None where they have different ones, or are none."""
        return self.versions[0] if len(set(self.versions)) == 1 else None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why rows have their scores, in log-odds: ``base`` and a row's contributions add up to the
    log-odds of its score. ``contributions`` has one number for each row, by feature.
    """

    version: int
    ids: list[str]
    scores: list[float]
    base: float
    contributions: dict[str, list[float]]
