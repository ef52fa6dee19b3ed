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

from headprof.compression.kernels.packed_rows import PackedRows, ragged_index, sums_before


@dataclass(frozen=True)
class QuantisedRows(PackedRows):
    """Each number is a code times a scale plus a zero, both in 16 bits: `code * scale + zero`.

    Attributes:
        bits: of a code, 8, 4 or 2; of the codes in a byte the lowest is that of a channel in the first part of the
            head's, the next that of the channel `D * bits / 8` further on, and so forth.
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
        groups = [-(-count // group_size) for count in counts]
        members = _members(counts, group_size, keys.device)
        key_scales = _scales(keys[members].float(), dim=1, bits=bits)
        group = _group_of_rows(counts, groups, group_size, keys.device)
        value_scales = _scales(values.float(), dim=1, bits=bits)
        return cls(
            first,
            sums_before(counts, keys.device),
            list(counts),
            bits,
            group_size,
            sums_before(groups, keys.device),
            _packed(_codes(keys.float(), key_scales[group], bits), bits),
            key_scales,
            _packed(_codes(values.float(), value_scales[..., None], bits), bits),
            value_scales,
        )

    @classmethod
    def of_parts(
        cls, parts: Mapping[str, Tensor], counts: Sequence[int], *, first: int, bits: int, group_size: int
    ) -> QuantisedRows:
        """Rows from their tensors, by the names that `parts` gives them."""
        device, groups = parts["key_codes"].device, [-(-count // group_size) for count in counts]
        known = sums_before(counts, device), list(counts), bits, group_size, sums_before(groups, device)
        return cls(first, *known, *(parts[name] for name in PARTS))

    def unpacked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        heads = self.per_head
        offset = torch.arange(self.total, device=heads.device)
        offset -= self.before[:-1].repeat_interleave(heads, output_size=self.total)
        group = self.groups_before[:-1].repeat_interleave(heads, output_size=self.total) + offset // self.group_size
        scale, zero = self.key_scales.unbind(1)
        keys = _numbers(self.key_codes, self.bits).mul_(scale[group]).add_(zero[group])
        values = _numbers(self.value_codes, self.bits).mul_(self.value_scales[:, :1]).add_(self.value_scales[:, 1:])
        return keys.to(dtype), values.to(dtype)

    def of_heads(self, heads: Sequence[int]) -> Self:
        counts, device = [self.counts[head] for head in heads], self.before.device
        groups = [-(-count // self.group_size) for count in self.counts]
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


def _members(counts: Sequence[int], group_size: int, device: torch.device) -> Tensor:
    """The rows of each group, int64 `[G, group_size]`; one of fewer rows has its last one again and again."""
    starts, sizes, start = [], [], 0
    for count in counts:
        for offset in range(0, count, group_size):
            starts.append(start + offset)
            sizes.append(min(group_size, count - offset))
        start += count
    within = torch.arange(group_size).minimum(torch.tensor(sizes, dtype=torch.int64)[:, None] - 1)
    return (torch.tensor(starts, dtype=torch.int64)[:, None] + within).to(device, non_blocking=True)


def _group_of_rows(counts: Sequence[int], groups: Sequence[int], group_size: int, device: torch.device) -> Tensor:
    """The group of each row, int64 `[P]`."""
    starts = [0, *accumulate(groups)]
    each = [torch.arange(count) // group_size + start for count, start in zip(counts, starts, strict=False) if count]
    return (torch.cat(each) if each else torch.empty(0, dtype=torch.int64)).to(device, non_blocking=True)


def _scales(numbers: Tensor, *, dim: int, bits: int) -> Tensor:
    """Scale and zero with which codes reach from the least to the largest of these, float16; stacked along `dim`."""
    least, largest = torch.aminmax(numbers, dim=dim)
    scale = (largest - least) / (2**bits - 1)
    return torch.stack([scale, least], dim=dim).half()


def _codes(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The codes next to these numbers, uint8 `[P, D]`; `scales` are `[P, 2, D]` or `[P, 2, 1]`."""
    scale, zero = scales.float().unbind(1)
    steps = (numbers - zero) / scale.masked_fill(scale == 0, 1.0)
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes `[P, D]` as bytes `[P, D * bits / 8]`."""
    first, *others = codes.chunk(8 // bits, dim=-1)
    for number, part in enumerate(others, start=1):
        first = first | part << number * bits
    return first


def _numbers(codes: Tensor, bits: int) -> Tensor:
    """Packed codes as numbers, float32 `[P, D]`."""
    parts = [codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=-1).float()
