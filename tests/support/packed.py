"""Rows of which some are packed, made of rows that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headprof.compression.kernels.latent_rows import LatentRows
from headprof.compression.kernels.low_rank_rows import LowRankRows
from headprof.compression.kernels.quantised_rows import QuantisedRows
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.kernels.shared_basis import turned
from headprof.compression.rows import Rows
from support.observations import observed_prompt


def packed_in(
    rows: RaggedRows, counts: Sequence[int], *, first: int = 1, bits: int = 4, group_size: int = 8
) -> RaggedRows:
    """The same storage with so many rows of each head quantised, after its `first`."""
    keep = _others(rows, counts, first)
    given = rows.keys[~keep], rows.values[~keep], counts
    packed = QuantisedRows.quantised(*given, first=first, bits=bits, group_size=group_size)
    return replace(rows, keys=rows.keys[keep], values=rows.values[keep], packed=packed, plans={})


def slow_numbers(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of numbers that have one scale and one zero, which are rounded to float16; in float64."""
    least, largest = numbers.float().min(), numbers.float().max()
    scale, zero = (float(each.half()) for each in ((largest - least) / (2**bits - 1), least))
    codes = [min(2**bits - 1, max(0, round((float(each) - zero) / scale))) if scale else 0 for each in numbers]
    return torch.tensor([code * scale + zero for code in codes], dtype=torch.float64)


def slow_twin(keys, values, counts, bits, group_size):
    """Keys and values after quantising, head by head, group by group, channel by channel."""
    keys, values, start = keys.double(), values.double(), 0
    new_keys, new_values = keys.clone(), values.clone()
    for count in counts:
        for first in range(start, start + count, group_size):
            group = slice(first, min(first + group_size, start + count))
            for channel in range(keys.shape[1]):
                new_keys[group, channel] = slow_numbers(keys[group, channel], bits)
        for row in range(start, start + count):
            new_values[row] = slow_numbers(values[row], bits)
        start += count
    return new_keys, new_values


def weights_of(queries: torch.Tensor, partners: Sequence[int] | None) -> torch.Tensor:
    """By how much an error in each channel of a key counts, float64 `[D]`; queries are those of its heads, `[n, D]`."""
    squares = [float(channel.double().square().mean()) for channel in queries.unbind(1)]
    if partners is not None:
        squares = [(square + squares[partner]) / 2 for square, partner in zip(squares, partners, strict=True)]
    mean = sum(squares) / len(squares)
    return torch.tensor([(square / mean + 1e-3) ** 0.5 for square in squares], dtype=torch.float64)


def best_of_rank(
    rows: torch.Tensor,
    rank: int,
    positions: torch.Tensor | None = None,
    rotary=None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows of this rank that are nearest, float64, where channels count by `weights`.

    They are keys before they are turned, if `rotary` is given.
    """
    if rotary is not None and len(rows):
        rows = rotary.unrotate(rows[None, None].float(), positions)[0, 0].double()
    weights = torch.ones(rows.shape[1], dtype=torch.float64) if weights is None else weights
    left, sizes, right = torch.linalg.svd(rows * weights, full_matrices=False)
    best = left[:, :rank] * sizes[:rank] @ right[:rank] / weights
    if rotary is not None and len(rows):
        best = rotary.rotate(best[None, None].float(), *rotary.angles(positions))[0, 0].double()
    return best


def low_rank_in(
    rows: RaggedRows, counts: Sequence[int], groups: Sequence[int], *, first: int = 1, rank: int = 6, turns: bool = True
) -> RaggedRows:
    """The same storage with so many rows of each head, after its `first`, in the bases of these groups."""
    keep, turning = _others(rows, counts, first), _turning(rows.keys.shape[1], turns)
    bases = _directions(rows.keys.shape[1], rank, groups), _directions(rows.keys.shape[1], rank, groups)
    into = bases[0].transpose(1, 2), bases[1].transpose(1, 2)
    keys = turned(rows.keys[~keep], -rows.positions[~keep], *turning)
    packed = LowRankRows.projected(
        keys, rows.values[~keep], counts, groups, into, bases, turning, first=first, dtype=rows.keys.dtype
    )
    return replace(rows, keys=rows.keys[keep], values=rows.values[keep], packed=packed, plans={})


def latents_in(rows: RaggedRows, counts: Sequence[int], groups: Sequence[int]) -> RaggedRows:
    """The same with latents of 8 dimensions in 4 bits."""
    keep, turning = _others(rows, counts, 1), _turning(rows.keys.shape[1], True)
    basis = _directions(2 * rows.keys.shape[1], 8, groups)
    keys = turned(rows.keys[~keep], -rows.positions[~keep], *turning)
    packed = LatentRows.projected(
        torch.cat([keys, rows.values[~keep]], dim=1),
        counts,
        groups,
        (basis.transpose(1, 2), basis),
        turning,
        first=1,
        bits=4,
        group_size=8,
        dtype=rows.keys.dtype,
    )
    return replace(rows, keys=rows.keys[keep], values=rows.values[keep], packed=packed, plans={})


def _others(rows: RaggedRows, counts: Sequence[int], first: int) -> torch.Tensor:
    """Which rows of the storage are not packed, bool `[rows]`."""
    keep = torch.ones(rows.size, dtype=torch.bool)
    for start, count in zip(rows.bounds[:-1:2].tolist(), counts, strict=True):
        keep[start + first : start + first + count] = False
    return keep


def _turning(dim: int, turns: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The halves of a head turned together, dimension `d` by `(d + 1) / dim` a position."""
    if not turns:
        return torch.tensor([]), torch.tensor([], dtype=torch.int16)
    half = torch.arange(1, dim // 2 + 1) / dim
    return torch.cat([half, -half]), torch.arange(dim).roll(dim // 2).short()


def _directions(dim: int, rank: int, groups: Sequence[int]) -> torch.Tensor:
    """Orthonormal rows for each of the groups, `[M, rank, dim]`."""
    return torch.linalg.qr(torch.randn(max(groups) + 1, dim, rank))[0].transpose(1, 2)


def like_a_layer(counts, head_dim, *, rank=None, seed=0, dtype=torch.float32):
    """Rows of heads, `[sum(counts), D]`, that lie near a space of few dimensions, or in one of `rank`."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -3, head_dim) if rank is None else torch.ones(head_dim)[:rank]
    numbers = torch.randn(sum(counts), len(spread), generator=generator) * spread
    return (numbers @ torch.randn(len(spread), head_dim, generator=generator)).to(dtype)


def held(kind, lengths, head_dim, *, batch=2, dtype=torch.float32, seed=0, first=1, **options):
    """Rows of `lengths`, what a representation of this kind makes of them, and what they were observed with."""
    keys, values = (like_a_layer(lengths, head_dim, seed=seed + each, dtype=dtype) for each in (0, 100))
    places = torch.cat([torch.arange(length, dtype=torch.int32) * 3 for length in lengths])
    block = torch.zeros(batch, len(lengths) // batch, 5, head_dim)
    queries = torch.randn(batch, 2 * block.shape[1], 5, head_dim, generator=torch.Generator().manual_seed(seed))
    observed = observed_prompt(queries * torch.logspace(-1, 0, head_dim), block, scaling=1.0)
    rows = Rows(keys, values, places, lengths)
    return rows, kind(**options).hold(rows, observed, first=first, newest=2), observed
