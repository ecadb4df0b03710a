"""A model that asks for more memory than there is, for rows that say so."""

from __future__ import annotations

import torch
from torch import Tensor

from mlops_ray.training.models import TabularNet

MANY_BYTES = 2**50


class Greedy(TabularNet):
    """Takes a petabyte where a number is beyond all that training has seen."""

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        """Map float32 [n, num_numeric] and int64 [n, categories] to logits [n]."""
        if float(x_num.max()) > 1e4:
            torch.empty(MANY_BYTES, dtype=torch.uint8)
        return super().forward(x_num, x_cat)
