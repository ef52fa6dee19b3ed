"""Rows whose keys have lost some channels, alike in all rows of a head (ThinK, Xu et al. 2024, arXiv 2407.21018).

Shapes as in `packed_rows`; `C` is the number of channels that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from headprof.compression.kernels.packed_rows import PackedRows, ragged_index, sums_before

PARTS = ("thin_keys", "thin_values", "key_channels")
"""The tensors of `ThinnedRows` by their names."""


@dataclass(frozen=True)
class ThinnedRows(PackedRows):
    """Keys in fewer channels; those that they have lost count as 0. Values are whole.

    Attributes:
        thin_keys: `[P, C]`.
        thin_values: `[P, D]`.
        key_channels: which channels each head's keys have, ascending, int16 `[N, C]`.
    """

    thin_keys: Tensor
    thin_values: Tensor
    key_channels: Tensor

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> int:
        return len(self.thin_keys)

    @property
    def kind(self) -> tuple[object, ...]:
        return (type(self), self.first, self.thin_keys.shape[1])

    @classmethod
    def thinned(cls, keys: Tensor, values: Tensor, counts: Sequence[int], channels: Tensor, *, first: int) -> Self:
        """Rows without some channels of their keys.

        Args:
            keys, values: of the rows, `[P, D]` each, head by head.
            counts: how many of them each head has, `N` numbers.
            channels: those that each head keeps, ascending, int64 `[N, C]`.
            first: rows of each head that come before them.
        """
        before = sums_before(counts, keys.device)
        of_rows = channels.repeat_interleave(before.diff().long(), dim=0, output_size=len(keys))
        return cls(first, before, list(counts), keys.gather(1, of_rows), values, channels.short())

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor], counts: Sequence[int], *, first: int) -> Self:
        """Rows from their tensors, by the names that `parts` gives them."""
        before = sums_before(counts, parts["thin_keys"].device)
        return cls(first, before, list(counts), *(parts[name] for name in PARTS))

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        of_rows = self.key_channels.long().repeat_interleave(self.per_head, dim=0, output_size=self.total)
        keys = torch.zeros_like(self.thin_values).scatter(1, of_rows, self.thin_keys)
        return keys.to(dtype), self.thin_values.to(dtype)

    def of_heads(self, heads: Sequence[int]) -> Self:
        counts, starts = [self.counts[head] for head in heads], [0, *accumulate(self.counts)]
        rows = ragged_index([starts[head] for head in heads], counts, self.before.device)
        own = torch.tensor(heads, dtype=torch.int64).to(rows.device, non_blocking=True)
        parts = {name: part[own if name == "key_channels" else rows] for name, part in self.parts.items()}
        return type(self).of_parts(parts, counts, first=self.first)

    def joined_with(self, parts: Sequence[PackedRows | int]) -> Self:
        packed = [each for each in parts if not isinstance(each, int)]
        counts = [count for each in parts for count in ([0] * each if isinstance(each, int) else each.counts)]
        joined = {name: torch.cat([each.parts[name] for each in packed]) for name in PARTS[:2]}
        none = torch.arange(self.thin_keys.shape[1], dtype=torch.int16, device=self.before.device)
        joined["key_channels"] = torch.cat(
            [none.repeat(each, 1) if isinstance(each, int) else each.parts["key_channels"] for each in parts]
        )
        return type(self).of_parts(joined, counts, first=self.first)
