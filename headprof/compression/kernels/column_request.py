"""What column sums are asked.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads in a group, `N` chosen queries, `T`
tokens of the prompt, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headprof.compression.kernels.constants import constant


@dataclass(frozen=True)
class ColumnRequest:
    """The arguments of one call of `column_sums`.

    `valid` is `None` where all keys are; `on_host` has the positions for the host, or is `None` where it must look.
    `spans_on_host` has what `spans_of` says of `valid`.
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
    spans_on_host: Sequence[Sequence[int]] | None = None
    plans: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def group_size(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def spans(self) -> Tensor:
        """What `spans_of` says of the keys, int32 `[B, 3]`."""
        batch, num_tokens = self.key.shape[0], self.key.shape[2]
        if self.valid is None:
            return constant((0, num_tokens, 0), self.key.device, torch.int32).expand(batch, 3)
        return spans_of(self.valid)

    def planned(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What has been made of the positions for keys of this number and a window of this size, made once."""
        key = (name, self.key.shape[2], self.sliding_window)
        if key not in self.plans:
            with torch.inference_mode(mode=False):
                self.plans[key] = make()
        return self.plans[key]

    def spans_for_host(self) -> Sequence[Sequence[int]]:
        """The same as numbers; where keys are padded and `spans_on_host` is not given, the host waits for them."""
        if self.valid is None:
            return [[0, self.key.shape[2], 0]] * self.key.shape[0]
        return spans_of(self.valid).tolist() if self.spans_on_host is None else self.spans_on_host

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


def spans_of(valid: Tensor) -> Tensor:
    """Each sequence's first valid token, the end of its valid tokens, and whether there are gaps: int32 `[B, 3]`.

    Args:
        valid: bool `[B, T]`.
    """
    index = torch.arange(valid.shape[1], device=valid.device)
    first = torch.where(valid, index, len(index)).amin(dim=1)
    end = torch.where(valid, index + 1, 0).amax(dim=1)
    gaps = valid.sum(dim=1) < end - first
    return torch.stack([first, end, gaps], dim=1).int()
