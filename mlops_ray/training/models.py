"""Networks for tabular data. Any torch module with the same ``forward`` can take their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TabularNet(nn.Module):
    """A multilayer perceptron over standardised numbers and embedded categories.

    Args:
        num_numeric: Width of the numeric input, missing-value indicators included.
        cardinalities: Number of codes of each categorical input; code 0 is unknown.
        hidden_sizes: Widths of the hidden layers.
        dropout: Share of hidden units dropped in training.
        embedding_size: Largest width of an embedding; small vocabularies get half their size.
        category_dropout: Share of codes replaced by unknown in training, so that the model
            learns what to answer for values that it has never seen.
    """

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        hidden_sizes: Sequence[int] = (128, 64),
        dropout: float = 0.1,
        embedding_size: int = 8,
        category_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.category_dropout = category_dropout
        sizes = [min(embedding_size, (cardinality + 1) // 2) for cardinality in cardinalities]
        self.embeddings = nn.ModuleList(
            nn.Embedding(cardinality, size)
            for cardinality, size in zip(cardinalities, sizes, strict=True)
        )
        for embedding in self.embeddings:
            assert isinstance(embedding, nn.Embedding)
            nn.init.normal_(embedding.weight, std=0.05)
            nn.init.zeros_(embedding.weight[0])
        layers: list[nn.Module] = []
        width = num_numeric + sum(sizes)
        for hidden in hidden_sizes:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        """Map float32 [n, num_numeric] and int64 [n, categories] to logits [n]."""
        if self.training and self.category_dropout > 0:
            kept = torch.rand(x_cat.shape, device=x_cat.device) >= self.category_dropout
            x_cat = x_cat * kept
        parts = [x_num]
        for place, embedding in enumerate(self.embeddings):
            parts.append(embedding(x_cat[:, place]))
        logits: Tensor = self.layers(torch.cat(parts, dim=1))
        return logits.squeeze(1)
