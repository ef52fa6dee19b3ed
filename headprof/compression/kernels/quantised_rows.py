"""Rows in 8, 4 or 2 bits: keys per channel in groups of a head's rows, values per row (KIVI, Liu et al. 2024).

"KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750, section 3.2. torchao, hqq and
optimum-quanto quantise a dense tensor in blocks that divide its sides, which heads of unequal length have not: hence a
packing of ours. Shapes as in `packed_rows`; `G` is the number of groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from headprof.compression.kernels.codes import (
    num_groups,
    packed_by_channel,
    packed_by_row,
    unpacked_by_channel,
    unpacked_by_row,
)
from headprof.compression.kernels.packed_rows import PackedRows, ragged_index, sums_before


@dataclass(frozen=True)
class QuantisedRows(PackedRows):
    """Each number is a code times a scale plus a zero, both in 16 bits: `code * scale + zero`.

    Attributes:
        bits: of a code, 8, 4 or 2 (see `codes`).
        group_size: rows of a head that have the scales of their keys in common; its last group may have fewer.
        groups_before: groups of all heads before each, then of all: int32 `[N + 1]`, on the device.
        key_codes, value_codes: uint8 `[P, D * bits / 8]`.
        key_scales: scale and zero of each group's channels, float16 `[G, 2, D]`.
        value_scales: scale and zero of each row, float16 `[P, 2]`.
    """

    bits: int
    group_size: int
    groups_before: Tensor
    key_codes: Tensor
    key_scales: Tensor
    value_codes: Tensor
    value_scales: Tensor

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> int:
        return len(self.key_codes)

    @property
    def kind(self) -> tuple[object, ...]:
        return (type(self), self.bits, self.group_size, self.first)

    @classmethod
    def quantised(
        cls, keys: Tensor, values: Tensor, counts: Sequence[int], *, first: int, bits: int, group_size: int
    ) -> QuantisedRows:
        """Rows packed; of each number the error is at most about half a step of its scale.

        Args:
            keys, values: of the rows that are to be packed, `[P, D]` each, head by head; `D * bits` a multiple of 8.
            counts: how many of them each head has, `N` numbers.
            first: rows of each head that come before them.
            bits: 8, 4 or 2.
            group_size: rows that have the scales of their keys in common, at least 1.
        """
        return cls(
            first,
            sums_before(counts, keys.device),
            list(counts),
            bits,
            group_size,
            sums_before(num_groups(counts, group_size), keys.device),
            *packed_by_channel(keys, counts, bits=bits, group_size=group_size),
            *packed_by_row(values, bits=bits),
        )

    @classmethod
    def of_parts(
        cls, parts: Mapping[str, Tensor], counts: Sequence[int], *, first: int, bits: int, group_size: int
    ) -> QuantisedRows:
        """Rows from their tensors, by the names that `parts` gives them."""
        device, groups = parts["key_codes"].device, num_groups(counts, group_size)
        known = sums_before(counts, device), list(counts), bits, group_size, sums_before(groups, device)
        return cls(first, *known, *(parts[name] for name in PARTS))

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        channels = {"bits": self.bits, "group_size": self.group_size}
        keys = unpacked_by_channel(self.key_codes, self.key_scales, self.before, self.groups_before, **channels)
        values = unpacked_by_row(self.value_codes, self.value_scales, bits=self.bits)
        return keys.to(dtype), values.to(dtype)

    def of_heads(self, heads: Sequence[int]) -> Self:
        counts, device = [self.counts[head] for head in heads], self.before.device
        groups = num_groups(self.counts, self.group_size)
        starts, group_starts = [0, *accumulate(self.counts)], [0, *accumulate(groups)]
        rows = ragged_index([starts[head] for head in heads], counts, device)
        own = ragged_index([group_starts[head] for head in heads], [groups[head] for head in heads], device)
        parts = {name: part[own if name == "key_scales" else rows] for name, part in self.parts.items()}
        return self._with(parts, counts)

    def joined_with(self, parts: Sequence[PackedRows | int]) -> Self:
        counts = [count for each in parts for count in ([0] * each if isinstance(each, int) else each.counts)]
        packed = [each for each in parts if not isinstance(each, int)]
        return self._with({name: torch.cat([each.parts[name] for each in packed]) for name in PARTS}, counts)

    def _with(self, parts: Mapping[str, Tensor], counts: Sequence[int]) -> Self:
        return type(self).of_parts(  # type: ignore[return-value]
            parts, counts, first=self.first, bits=self.bits, group_size=self.group_size
        )


PARTS = ("key_codes", "key_scales", "value_codes", "value_scales")
"""The tensors of `QuantisedRows` by their names."""
