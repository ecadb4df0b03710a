"""A model that asks for more memory than there is, for a certain number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mlops_ray.training.models import TabularNet

MANY_BYTES = 2**50
ROWS = 777


class Greedy(TabularNet):
    """Takes a petabyte where it gets ``ROWS`` rows."""

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        """Map float32 [n, num_numeric] and int64 [n, categories] to logits [n]."""
        if x_num.shape[0] == ROWS:
            torch.empty(MANY_BYTES, dtype=torch.uint8)
        return super().forward(x_num, x_cat)
