"""What column sums are asked.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads in a group, `N` chosen queries, `T`
tokens of the prompt, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnRequest:
    """The arguments of one call of `column_sums`."""

    query: Tensor
    key: Tensor
    positions: Tensor
    valid: Tensor
    scaling: float
    softcap: float | None
    sliding_window: int | None
    weights: Tensor | None

    @property
    def group_size(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def spans(self) -> Tensor:
        """Each sequence's first valid key, the end of its valid keys, and whether there are gaps: int32 `[B, 3]`."""
        index = torch.arange(self.valid.shape[1], device=self.valid.device)
        first = torch.where(self.valid, index, len(index)).amin(dim=1)
        end = torch.where(self.valid, index + 1, 0).amax(dim=1)
        gaps = self.valid.sum(dim=1) < end - first
        return torch.stack([first, end, gaps], dim=1).int()

    def check(self) -> None:
        """See that the shapes fit together.

        Raises:
            ValueError: they do not.
        """
        batch, num_heads, num_queries, head_dim = self.query.shape
        _, num_kv_heads, num_tokens, _ = self.key.shape
        fits = (
            self.key.shape == (batch, num_kv_heads, num_tokens, head_dim)
            and num_heads % num_kv_heads == 0
            and self.positions.shape == (num_queries,)
            and self.valid.shape == (batch, num_tokens)
            and (self.weights is None or self.weights.shape == (num_queries,))
        )
        if not fits:
            shapes = [
                tuple(each.shape)
                for each in (self.query, self.key, self.positions, self.valid, self.weights)
                if each is not None
            ]
            raise ValueError(f"shapes of query, key, positions, valid and weights do not fit together: {shapes}")
