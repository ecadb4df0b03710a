"""The training loop: data parallel, deterministic, resumable; knows nothing of Ray.

Every rank computes the same permutation of all rows and takes its share of each global batch, so
a batch means the same for any number of workers, and all ranks step equally often. Gradients are
added up in one all-reduce a step. The same inputs, seed and number of workers give the same
weights, bit for bit, also when a run was cut off and resumed from the state of an epoch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlops_ray.config.targets import load
from mlops_ray.config.training import Model, Training
from mlops_ray.errors import TrainingError
from mlops_ray.training.dataset import Rows
from mlops_ray.training.evaluation import auc, log_loss
from mlops_ray.training.optimizer import AdamW, one_cycle

State = dict[str, Any]

_EVALUATION_ROWS = 16_384


class Collective(Protocol):
    """The workers that train one model together."""

    rank: int
    size: int

    def sum_(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over all ranks, in place."""


class Alone:
    """A collective of one."""

    rank = 0
    size = 1

    def sum_(self, values: Tensor) -> None:
        """Leave the values as they are: they are the sum already."""


@dataclass(frozen=True)
class Settings:
    """What determines the trained weights, beside the rows and the number of workers.

    ``model`` holds all constructor arguments; inputs are clipped at ``training.clip``.
    """

    model: Model
    training: Training
    seed: int
    numeric_features: int


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave. The validation metrics are NaN on ranks other than 0."""

    epoch: int
    train_loss: float
    log_loss: float
    auc: float
    rows: int

    def metrics(self) -> dict[str, float]:
        """Return the epoch as flat metrics."""
        return {
            "epoch": self.epoch,
            "train_loss": self.train_loss,
            "validation_log_loss": self.log_loss,
            "validation_auc": self.auc,
        }


def build(model: Model) -> nn.Module:
    """Build the module that ``model`` names, with its arguments.

    Raises:
        TrainingError: the target is no torch module class or refuses the arguments.
    """
    kind = load(model.target)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TrainingError(
            f"{model.target} is not a torch module class",
            where="model._target_",
            fix="name a class that derives from torch.nn.Module",
        )
    try:
        return kind(**model.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f"{model.target} refuses its arguments {sorted(model.arguments)}",
            where="model",
            why=str(error),
            fix="the class gets num_numeric and cardinalities, and the model's other keys",
        ) from error


def train(
    settings: Settings,
    rows: Rows,
    validation: Rows,
    *,
    collective: Collective | None = None,
    device: str = "cpu",
    resume: State | None = None,
) -> Iterator[tuple[Epoch, State]]:
    """Train epoch by epoch; yield what each gave and the state to resume from after it.

    The state holds the best weights so far (``best``), by validation log loss on rank 0; on other
    ranks it is empty. A ``resume`` state of the last epoch yields nothing.
    """
    collective = collective or Alone()
    make_deterministic(settings.seed, device)
    module = build(settings.model).to(device)
    step = _Step(settings, module, rows, collective, device)
    progress = _Progress(settings, step, resume)
    plan = _plan(settings, len(rows), collective)
    for epoch in range(progress.done, settings.training.epochs):
        torch.manual_seed(_mix(settings.seed, epoch, collective.rank))
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(rows))
        loss = 0.0
        module.train()
        for number, batch in enumerate(np.array_split(order, plan)):
            share = (epoch * plan + number) / (settings.training.epochs * plan)
            loss += step(batch, settings.training.learning_rate * one_cycle(share))
        judged = (math.nan, math.nan)
        if collective.rank == 0:
            scores = predict(module, validation, settings, device)
            judged = (log_loss(validation.labels, scores), auc(validation.labels, scores))
        result = Epoch(epoch + 1, loss / plan, *judged, rows=len(rows))
        yield result, progress.after(result) if collective.rank == 0 else {}


def make_deterministic(seed: int, device: str) -> None:
    """Seed torch, and make it refuse operations whose result is not repeatable."""
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)


def predict(
    module: nn.Module, rows: Rows, settings: Settings, device: str = "cpu"
) -> npt.NDArray[np.float64]:
    """Return the module's scores, float64 [n], in evaluation mode."""
    module.eval()
    scores = np.empty(len(rows))
    with torch.inference_mode():
        for start in range(0, len(rows), _EVALUATION_ROWS):
            places = np.arange(start, min(start + _EVALUATION_ROWS, len(rows)))
            logits = module(*_inputs(rows, places, settings, device))
            scores[places] = torch.sigmoid(logits.double()).cpu().numpy()
    return scores


class _Step:
    """One optimisation step on this rank's share of a global batch."""

    def __init__(
        self,
        settings: Settings,
        module: nn.Module,
        rows: Rows,
        collective: Collective,
        device: str,
    ) -> None:
        half_life = settings.training.half_life
        self.module = module
        self.optimizer = AdamW(
            list(module.parameters()), weight_decay=settings.training.weight_decay
        )
        self._settings = settings
        self._rows = rows
        self._weights = rows.weights(half_life.total_seconds() if half_life else None)
        self._collective = collective
        self._device = device

    def __call__(self, batch: npt.NDArray[np.int64], learning_rate: float) -> float:
        """Step on the rows ``batch``; return the batch's weighted loss."""
        own = batch[self._collective.rank :: self._collective.size]
        labels = torch.from_numpy(self._rows.labels[own]).to(self._device)
        # All ranks know all weights, so the mean over the global batch needs no extra message.
        weights = torch.from_numpy(self._weights[own] / self._weights[batch].sum())
        logits = self.module(*_inputs(self._rows, own, self._settings, self._device))
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        loss = (losses * weights.to(self._device)).sum()
        loss.backward()
        whole = self._sum_over_ranks(loss.detach())
        self.optimizer.step(learning_rate)
        return whole

    def _sum_over_ranks(self, loss: Tensor) -> float:
        """Replace the gradients by those of the global batch; return its loss."""
        if self._collective.size == 1:
            return loss.item()
        # A parameter may have no gradient on one rank only; all must send equally many values.
        parameters = self.optimizer.parameters
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
        self._collective.sum_(flat)
        parts = flat[1:].split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return flat[0].item()


class _Progress:
    """How far a training is and its best weights: what a resumed one starts from."""

    def __init__(self, settings: Settings, step: _Step, resume: State | None) -> None:
        self._step = step
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.best_log_loss = math.inf
        if resume:
            step.module.load_state_dict(resume["module"])
            step.optimizer.load(resume["optimizer"])
            self.history = list(resume["history"])
            self.best = resume["best"]
            self.best_epoch = resume["best_epoch"]
            self.best_log_loss = resume["best_log_loss"]

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    def after(self, epoch: Epoch) -> State:
        """Take note of an epoch and return the state."""
        if not math.isfinite(epoch.log_loss):
            raise TrainingError(
                f"the training diverged in epoch {epoch.epoch}: log loss {epoch.log_loss}",
                fix="lower training.learning_rate or training.clip",
            )
        weights = {k: v.detach().cpu().clone() for k, v in self._step.module.state_dict().items()}
        self.history.append(epoch.metrics())
        if epoch.log_loss < self.best_log_loss:
            self.best, self.best_epoch, self.best_log_loss = weights, epoch.epoch, epoch.log_loss
        return {
            "module": weights,
            "optimizer": self._step.optimizer.state(),
            "history": list(self.history),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_log_loss": self.best_log_loss,
        }


def _plan(settings: Settings, rows: int, collective: Collective) -> int:
    """Return the number of steps of an epoch: batches of equal size, near ``batch_size``."""
    steps = max(1, round(rows / settings.training.batch_size))
    if rows // steps < collective.size:
        raise TrainingError(
            f"batches of {rows // steps} rows cannot be shared by {collective.size} workers",
            fix="raise training.batch_size or lower training.workers",
        )
    return steps


def _inputs(
    rows: Rows, places: npt.NDArray[np.int64], settings: Settings, device: str
) -> tuple[Tensor, Tensor]:
    numeric = torch.from_numpy(rows.numeric[places])
    clip = settings.training.clip
    numeric[:, : settings.numeric_features].clamp_(-clip, clip)
    codes = torch.from_numpy(rows.categorical[places].astype(np.int64))
    return numeric.to(device), codes.to(device)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0] >> 1)
