"""AdamW and its learning rate, over torch's functional form.

``torch.optim.AdamW`` imports torch's compiler when it is made, which costs each worker of each
training about two seconds and a hundred megabytes; the functional form is the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

_WARMUP = 0.1
_START, _END = 0.04, 1e-4


def one_cycle(share: float) -> float:
    """Return the learning rate as a share of its peak, after ``share`` (0 to 1) of the steps.

    It rises to 1 over the first tenth and falls to almost 0, both along a cosine (Smith and Topin
    2019, "Super-Convergence").
    """
    if share < _WARMUP:
        return _cosine(_START, 1.0, share / _WARMUP)
    return _cosine(1.0, _END, (share - _WARMUP) / (1 - _WARMUP))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019). Updates in place."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._weight_decay = weight_decay
        self._betas = betas
        self._epsilon = epsilon
        self._means = [torch.zeros_like(p) for p in self.parameters]
        self._squares = [torch.zeros_like(p) for p in self.parameters]
        self._steps = [torch.tensor(0.0) for _ in self.parameters]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the parameters that have a gradient, and drop the gradients."""
        live = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        adamw(
            [self.parameters[i] for i in live],
            [g for p in self.parameters if (g := p.grad) is not None],
            [self._means[i] for i in live],
            [self._squares[i] for i in live],
            [],
            [self._steps[i] for i in live],
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=learning_rate,
            weight_decay=self._weight_decay,
            eps=self._epsilon,
            maximize=False,
        )
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, list[Tensor]]:
        """Return a copy of the state, on the CPU."""
        lists = {"means": self._means, "squares": self._squares, "steps": self._steps}
        return {name: [t.cpu().clone() for t in tensors] for name, tensors in lists.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state that ``state`` returned."""
        for name in ("means", "squares", "steps"):
            for own, saved in zip(getattr(self, f"_{name}"), state[name], strict=True):
                own.copy_(saved)
