"""Feature columns → model input, the same in training and in serving.

Numeric columns are standardised and clipped; a missing value becomes 0 (the mean), and a column
that had missing values in training gets an indicator input. Categorical values become codes; values
never seen in training share code 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from mlops_ray.errors import TrainingError
from mlops_ray.features.matrix import FeatureMatrix
from mlops_ray.metadata.package import EncoderSpec

Columns = Mapping[str, npt.NDArray[Any]]
Inputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
RawInputs = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


class Scaling(nn.Module):
    """Standardises, clips and fills numeric columns, and adds the indicators of missing values.

    A module, so that a model that serves has it inside whatever it is compiled to.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.clip = spec.clip
        self.has_indicators = bool(spec.indicators)
        places = [spec.numeric.index(name) for name in spec.indicators]
        self.means = nn.Buffer(torch.tensor(spec.means, dtype=torch.float64))
        self.stds = nn.Buffer(torch.tensor(spec.stds, dtype=torch.float64))
        self.places = nn.Buffer(torch.tensor(places, dtype=torch.int64))

    def forward(self, numbers: Tensor) -> Tensor:
        """Map float64 [n, features] to float32 [n, features + indicators]."""
        scores = (numbers - self.means).div_(self.stds)
        missing = torch.isnan(scores)
        scores = scores.clamp_(-self.clip, self.clip).masked_fill_(missing, 0.0).float()
        if not self.has_indicators:
            return scores
        return torch.cat([scores, missing[:, self.places].float()], dim=1)


class Encoder:
    """Encodes columns as ``spec`` says. Immutable; safe to share between threads."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.scaling = Scaling(spec)
        self._codes = [
            {value: code for code, value in enumerate(vocabulary, start=1)}
            for vocabulary in spec.vocabularies
        ]

    @classmethod
    def fit(cls, numeric: Columns, categorical: Columns, *, clip: float = 4.0) -> Self:
        """Learn means, deviations and vocabularies from training columns, each [n].

        A constant column gets deviation 1; an empty one mean 0. Vocabularies are sorted.
        """
        moments = [_moments(numeric[name]) for name in numeric]
        vocabularies = [_vocabulary(categorical[name]) for name in categorical]
        return cls(
            EncoderSpec(
                numeric=tuple(numeric),
                means=tuple(mean for mean, _, _ in moments),
                stds=tuple(std for _, std, _ in moments),
                indicators=tuple(n for n, m in zip(numeric, moments, strict=True) if m[2]),
                clip=clip,
                categorical=tuple(categorical),
                vocabularies=tuple(vocabularies),
            )
        )

    def encode(self, columns: Columns) -> Inputs:
        """Return (float32 [n, k], int64 [n, c]); ``columns`` holds every feature, each [n].

        Raises:
            TrainingError: a feature column is missing.
        """
        numbers, codes = self.raw(columns)
        with torch.inference_mode():
            encoded: npt.NDArray[np.float32] = self.scaling(torch.from_numpy(numbers)).numpy()
        return encoded, codes

    def raw(self, columns: Columns) -> RawInputs:
        """Return the same before ``scaling``: the numeric columns as they are, float64 [n, features].

        Raises:
            TrainingError: a feature column is missing.
        """
        try:
            numbers = self._numbers(columns)
            categorical = [columns[name] for name in self.spec.categorical]
        except KeyError:
            raise self._missing(columns) from None
        if numbers is None:
            numbers = np.empty((len(categorical[0]), 0))
        codes = np.empty((len(numbers), len(categorical)), dtype=np.int64)
        for place, values in enumerate(categorical):
            codes[:, place] = self._encode_values(place, values)
        return numbers, codes

    def own(self, columns: Columns) -> Columns:
        """Return the columns that are encoded, and others where they come in one matrix.

        Raises:
            TrainingError: a feature column is missing.
        """
        if isinstance(columns, FeatureMatrix):
            return columns
        try:
            return {name: columns[name] for name in self.spec.features}
        except KeyError:
            raise self._missing(columns) from None

    def _numbers(self, columns: Columns) -> npt.NDArray[np.float64] | None:
        names = self.spec.numeric
        if isinstance(columns, FeatureMatrix) and columns.numeric == names:
            return columns.matrix
        if not names:
            return None
        return np.array([columns[name] for name in names], dtype=np.float64).T

    def _encode_values(self, place: int, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        codes = map(self._codes[place].get, values.tolist(), repeat(0))
        return np.fromiter(codes, np.int64, len(values))

    def _missing(self, columns: Columns) -> TrainingError:
        absent = [name for name in self.spec.features if name not in columns]
        return TrainingError(
            f"{len(absent)} feature columns of the model are missing: {', '.join(absent[:5])}",
            fix="give all columns of the model's feature service",
        )


def _moments(values: npt.NDArray[Any]) -> tuple[float, float, bool]:
    numbers = np.asarray(values, dtype=np.float64)
    finite = numbers[np.isfinite(numbers)]
    has_missing = bool(np.isnan(numbers).any())
    if len(finite) == 0:
        return 0.0, 1.0, has_missing
    deviation = float(finite.std())
    return float(finite.mean()), deviation if deviation > 1e-9 else 1.0, has_missing


def _vocabulary(values: npt.NDArray[Any]) -> tuple[str, ...]:
    distinct = pc.unique(pa.array(values, pa.string(), from_pandas=True))
    return tuple(sorted(value for value in distinct.to_pylist() if value is not None))
