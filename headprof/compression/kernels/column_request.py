"""What column sums and column maxima are asked.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads in a group, `N` chosen queries, `T`
tokens of the prompt, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headprof.compression.kernels import looking
from headprof.compression.kernels.constants import constant


@dataclass(frozen=True)
class ColumnRequest:
    """The arguments of one call of `column_sums`, or of `column_maxima`, which is `largest`.

    `valid` is `None` where all keys are; `on_host` has the positions for the host, or is `None` where it must look.
    `plans` has what a backend makes of the positions, for the next request with the same ones.
    """

    query: Tensor
    key: Tensor
    positions: Tensor
    valid: Tensor | None
    scaling: float
    softcap: float | None
    sliding_window: int | None
    weights: Tensor | None
    on_host: Sequence[int] | None = None
    plans: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)
    largest: bool = False

    @property
    def group_size(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def spans(self) -> Tensor:
        """Each sequence's first valid key, the end of its valid keys, and whether there are gaps: int32 `[B, 3]`."""
        batch, num_tokens = self.key.shape[0], self.key.shape[2]
        if self.valid is None:
            return constant((0, num_tokens, 0), self.key.device, torch.int32).expand(batch, 3)
        index = torch.arange(num_tokens, device=self.valid.device)
        first = torch.where(self.valid, index, num_tokens).amin(dim=1)
        end = torch.where(self.valid, index + 1, 0).amax(dim=1)
        gaps = self.valid.sum(dim=1) < end - first
        return torch.stack([first, end, gaps], dim=1).int()

    def planned(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What has been made of the positions for keys of this number and a window of this size, made once."""
        key = (name, self.key.shape[2], self.sliding_window)
        if key not in self.plans:
            with torch.inference_mode(mode=False):
                self.plans[key] = make()
        return self.plans[key]

    def spans_for_host(self) -> Sequence[Sequence[int]]:
        """The same as numbers, or the whole prompt with gaps where the host would have to wait for them."""
        if self.valid is not None and looking.is_free(self.valid.device):
            return self.spans().tolist()
        return [[0, self.key.shape[2], self.valid is not None]] * self.key.shape[0]

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
            and (self.valid is None or self.valid.shape == (batch, num_tokens))
            and (self.on_host is None or len(self.on_host) == num_queries)
            and (self.weights is None or self.weights.shape == (num_queries,))
        )
        if not fits:
            shapes = [
                tuple(each.shape)
                for each in (self.query, self.key, self.positions, self.valid, self.weights)
                if each is not None
            ]
            raise ValueError(f"shapes of query, key, positions, valid and weights do not fit together: {shapes}")
