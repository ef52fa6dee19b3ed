"""Numbers in 8, 4 or 2 bits: a code times a scale plus a zero, both in float16.

Of the codes in a byte the lowest is that of a channel in the first part of all, the next that of the channel as far on
as there are bytes, and so forth. Shapes as in `packed_rows`; `C` channels, `G` groups of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def num_groups(counts: Sequence[int], group_size: int) -> list[int]:
    """Groups of each head that has so many rows; its last may have fewer rows."""
    return [-(-count // group_size) for count in counts]


def packed_by_channel(numbers: Tensor, counts: Sequence[int], *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Rows in codes with a scale and a zero for each channel, which a group of a head's rows has in common.

    Args:
        numbers: float `[P, C]`, head by head; `C * bits` a multiple of 8.
        counts: rows of each head.
        bits: of a code.
        group_size: rows of a group.

    Returns:
        Codes, uint8 `[P, C * bits / 8]`, and scales and zeros, float16 `[G, 2, C]`.
    """
    members = _members(counts, group_size, numbers.device)
    scales = _scales(numbers[members].float(), dim=1, bits=bits)
    group = _group_of_rows(counts, group_size, numbers.device)
    return _packed(_codes(numbers.float(), scales[group], bits), bits), scales


def unpacked_by_channel(
    codes: Tensor, scales: Tensor, before: Tensor, groups_before: Tensor, *, bits: int, group_size: int
) -> Tensor:
    """The numbers again, float32 `[P, C]`.

    Args:
        codes, scales: as `packed_by_channel` gives them.
        before, groups_before: rows and groups of all heads before each, then of all, int32 `[N + 1]`.
        bits, group_size: with which they were packed.
    """
    heads, total = before.diff().long(), len(codes)
    offset = torch.arange(total, device=codes.device)
    offset -= before[:-1].repeat_interleave(heads, output_size=total)
    group = groups_before[:-1].repeat_interleave(heads, output_size=total) + offset // group_size
    scale, zero = scales.unbind(1)
    return _numbers(codes, bits).mul_(scale[group]).add_(zero[group])


def packed_by_row(numbers: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Rows `[P, C]` in codes with a scale and a zero for each: uint8 `[P, C * bits / 8]`, float16 `[P, 2]`."""
    scales = _scales(numbers.float(), dim=1, bits=bits)
    return _packed(_codes(numbers.float(), scales[..., None], bits), bits), scales


def unpacked_by_row(codes: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    """The numbers again, float32 `[P, C]`."""
    return _numbers(codes, bits).mul_(scales[:, :1]).add_(scales[:, 1:])


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


def _group_of_rows(counts: Sequence[int], group_size: int, device: torch.device) -> Tensor:
    """The group of each row, int64 `[P]`."""
    starts = [0, *accumulate(num_groups(counts, group_size))]
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
