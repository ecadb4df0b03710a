"""A made-up problem for the training tests: a label that depends on its features."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from mlops_ray.config.features import Features
from mlops_ray.config.training import Model, Training
from mlops_ray.training.models import TabularNet

START = datetime(2013, 1, 1, tzinfo=UTC)
NUMERIC = ("a", "b", "constant")
CATEGORICAL = ("colour",)


def rows(count: int = 3000, seed: int = 0) -> pa.Table:
    """Return labelled rows, one a minute, each known an hour later; ``b`` is missing now and then."""
    random = np.random.default_rng(seed)
    a = random.standard_normal(count)
    b = random.standard_normal(count) * 50 + 10
    colour = random.choice(["red", "green", "blue"], count)
    logit = 1.5 * a - 0.02 * (b - 10) + np.where(colour == "red", 1.0, -0.5)
    label = (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    times = [START + timedelta(minutes=i) for i in range(count)]
    instant = pa.timestamp("us", "UTC")
    return pa.table(
        {
            "id": [str(i) for i in range(count)],
            "at": pa.array(times, instant),
            "known_at": pa.array([t + timedelta(hours=1) for t in times], instant),
            "label": label,
            "a": a,
            "b": pa.array(np.where(random.random(count) < 0.1, np.nan, b), from_pandas=True),
            "constant": np.full(count, 7.0),
            "colour": pa.array(colour, pa.string()),
        }
    )


def features() -> Features:
    """Return the declaration of a store whose service has only request features."""
    return Features.model_validate(
        {
            "sources": {"events": {"path": "events.csv", "available_at": "at"}},
            "entities": {},
            "views": {},
            "services": {
                "all": {
                    "views": [],
                    "inputs": {"at": {"dtype": "timestamp"}},
                    "time": "at",
                    "on_demand": ["facts"],
                }
            },
            "on_demand": {
                "facts": {
                    "function": "samples.request",
                    "numeric": NUMERIC,
                    "categorical": CATEGORICAL,
                }
            },
            "labels": {
                "source": "events",
                "id": "id",
                "time": "at",
                "label": "label",
                "known_at": "known_at",
            },
        }
    )


def training(**changes: Any) -> Training:
    """Return settings that train in a second."""
    values: dict[str, Any] = {
        "service": "all",
        "workers": 2,
        "use_gpu": False,
        "epochs": 3,
        "batch_size": 256,
        "learning_rate": 5e-3,
        "split": {"test": "8h", "validation": "8h"},
    }
    return Training.model_validate(values | changes)


def model(target: str = "mlops_ray.training.models.TabularNet", **arguments: Any) -> Model:
    """Return a small model."""
    return Model.model_validate({"_target_": target, "hidden_sizes": [16], **arguments})


class Killable(TabularNet):
    """Its process is killed in the ``at_batch``-th training batch, unless the file ``flag`` exists."""

    def __init__(self, *, flag: str, at_batch: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._flag = Path(flag)
        self._left = at_batch

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        if self.training:
            self._left -= 1
        if self._left == 0 and not self._flag.exists():
            self._flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x_num, x_cat)


class TwoLogits(TabularNet):
    """Returns two logits a row, which is one too many."""

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        logits = super().forward(x_num, x_cat)
        return logits.unsqueeze(1).repeat(1, 2)


class Counted(TabularNet):
    """Writes a line to the file ``log`` whenever one is made."""

    def __init__(self, *, log: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        with Path(log).open("a") as file:
            file.write("made\n")
