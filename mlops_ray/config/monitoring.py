"""Declarations of monitoring and of the loop that it closes."""

from __future__ import annotations

from pydantic import Field

from mlops_ray.config.base import Duration, Frozen, Instant


class Drift(Frozen):
    """Drift of the live distribution of features against the training reference, by PSI.

    Counts as drifted when at least ``min_features`` features have a population stability index of
    ``threshold`` or more over the last ``window``, which must hold at least ``min_rows`` rows.
    """

    window: Duration
    bins: int = Field(default=10, ge=2)
    threshold: float = Field(default=0.2, gt=0)
    min_features: int = Field(default=3, ge=1)
    min_rows: int = Field(default=500, ge=1)
    exclude: tuple[str, ...] = ()


class Performance(Frozen):
    """The labelled error over the last ``window``, against the model's own evaluation.

    Counts as degraded when AUC fell by ``max_auc_drop`` or log loss rose by ``max_log_loss_rise``.
    """

    window: Duration
    max_auc_drop: float = Field(default=0.03, gt=0)
    max_log_loss_rise: float = Field(default=0.05, gt=0)
    min_rows: int = Field(default=500, ge=1)


class Monitoring(Frozen):
    """What the monitor of an endpoint watches, and how often (``every``, in the clock's time)."""

    every: Duration
    drift: Drift
    performance: Performance
    label_horizon: Duration = Field(default="14d", validate_default=True)


class Loop(Frozen):
    """When the loop retrains. ``cooldown`` is the least time between two retrainings;
    ``budget`` the most (virtual) time that one may cost; ``workflow`` the one to submit."""

    cooldown: Duration
    budget: Duration = Field(default="6h", validate_default=True)
    workflow: str = "retrain"
    max_retrainings: int | None = Field(default=None, ge=0)


class Replay(Frozen):
    """History sent to the endpoint in time order, on a virtual clock that moves by ``step``."""

    start: Instant
    end: Instant
    step: Duration = Field(default="1h", validate_default=True)
    concurrency: int = Field(default=8, ge=1)
