"""Declarations of training: the model, the loop, the split, tuning, evaluation, the gate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mlops_ray.config.base import Component, Duration, Frozen

SearchKey = Annotated[str, Field(pattern=r"^(training|model)\.[A-Za-z]\w*$")]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Split(Frozen):
    """Split by time: the newest ``test`` of the labelled rows judge the model, the ``validation``
    before them choose the best epoch, the rest trains it. A row belongs to a part by its prediction
    time; a training row whose label became known only inside the test part is left out."""

    test: Duration
    validation: Duration


class Training(Frozen):
    """How a model is trained by Ray Train.

    ``half_life`` weighs rows by recency: a row that much older counts half (None: all alike).
    ``use_gpu`` auto takes GPUs where the cluster has enough of them.
    """

    service: str
    workers: int = Field(default=2, ge=1)
    use_gpu: Literal["auto"] | bool = "auto"
    epochs: int = Field(default=4, ge=1)
    batch_size: int = Field(default=2048, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    half_life: Duration | None = None
    clip: float = Field(default=4.0, gt=0)
    split: Split


class SearchDimension(Frozen):
    """One dimension of a search space; ``path`` in the key names a field of training or model."""

    kind: Literal["uniform", "loguniform", "choice", "randint"]
    low: float | None = None
    high: float | None = None
    values: tuple[float | int | str, ...] = ()


class Tuning(Frozen):
    """A search by Ray Tune with ASHA. ``space`` keys are ``training.X`` or ``model.X``."""

    trials: int = Field(default=8, ge=1)
    concurrent: int = Field(default=2, ge=1)
    grace_epochs: int = Field(default=1, ge=1)
    reduction_factor: int = Field(default=2, ge=2)
    metric: Literal["auc", "log_loss"] = "auc"
    space: dict[SearchKey, SearchDimension] = Field(default_factory=dict)


class Evaluation(Frozen):
    """What is measured on held-out rows. ``slices`` are columns of the label source or inputs."""

    slices: tuple[str, ...] = ()
    min_slice_rows: int = Field(default=200, ge=1)
    calibration_bins: int = Field(default=10, ge=2)


class Gate(Frozen):
    """When a challenger may replace the champion, judged on the same held-out rows.

    ``min_gain`` is the least gain in ``metric`` (AUC up, log loss down). Without a champion,
    ``floor`` is the least value of the metric itself (for log loss: the most).
    """

    metric: Literal["auc", "log_loss"] = "auc"
    min_gain: float = 0.0
    floor: float | None = None
    max_calibration_error: float | None = Field(default=None, gt=0)


class Model(Component):
    """The model: ``_target_`` is a torch module class, the other keys its arguments."""
