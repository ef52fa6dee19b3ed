"""Budgets that lose least, by what each head loses when it keeps so many tokens: pure functions.

What all heads lose is taken to be the sum of what each of them does. Each head's losses are made to fall and to fall
ever more slowly (its lower convex hull), and then every token goes where it saves most: for convex losses nothing does
better (Fox 1966, "Discrete optimization via marginal analysis").

Shapes: `L` layers, `K` KV heads, `N` numbers of tokens at which losses are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from headprof.compression.methods.allocation import water_filled


@dataclass(frozen=True)
class _Stretch:
    """Tokens of one head that all save alike.

    Attributes:
        gain: what each of them saves.
        head: number of the head.
        tokens: how many they are.
    """

    gain: float
    head: int
    tokens: int


def solve(curves: Tensor, grid: Sequence[int], total: int, lower: int | Tensor, upper: int | Tensor) -> Tensor:
    """Tokens per head whose losses sum to the least that these curves allow.

    Between numbers of tokens that are known, losses are interpolated; below the first they go on rising as steeply as
    after it, and beyond the last nothing more is saved. Tokens that save alike are shared evenly.

    Args:
        curves: what each head loses at each of `grid`, float `[L, K, N]`; where it does not fall, it is levelled.
        grid: numbers of tokens, ascending, `N`.
        total: between the sum of the lower and that of the upper bounds.
        lower, upper: fewest and most tokens of a head: one number, or one for each, `[L, K]`.

    Returns:
        int64 `[L, K]` that sums to `total` exactly.
    """
    heads = curves.shape[:-1]
    least, most = (torch.as_tensor(bound).expand(heads).flatten().tolist() for bound in (lower, upper))
    counts = list(least)
    stretches: list[_Stretch] = []
    for head, losses in enumerate(curves.double().flatten(0, -2).tolist()):
        stretches += _stretches(head, convex_hull(grid, falling(losses)), least[head], most[head])
    left = total - sum(counts)
    for _, alike in groupby(sorted(stretches, key=lambda stretch: -stretch.gain), key=lambda stretch: stretch.gain):
        group = list(alike)
        sizes = [stretch.tokens for stretch in group]
        given = sizes if sum(sizes) <= left else _evenly(sizes, left)
        for stretch, tokens in zip(group, given, strict=True):
            counts[stretch.head] += tokens
        left -= sum(given)
    return torch.tensor(counts, dtype=torch.int64).view(heads)


def falling(losses: Sequence[float]) -> list[float]:
    """The nearest numbers in least squares that never rise (pooling adjacent violators, Ayer et al. 1955)."""
    blocks: list[tuple[float, int]] = []  # mean and size of what has been levelled
    for loss in losses:
        mean, size = loss, 1
        while blocks and blocks[-1][0] < mean:
            before, count = blocks.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]


def convex_hull(grid: Sequence[int], losses: Sequence[float]) -> list[tuple[int, float]]:
    """The corners of the largest convex curve below some points, ascending.

    Args:
        grid: where they are, ascending.
        losses: how high.
    """
    corners: list[tuple[int, float]] = []
    for point in zip(grid, losses, strict=True):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def refined(curves: Tensor, grid: Sequence[int], parts: int = 4) -> tuple[Tensor, list[int]]:
    """The same curves at more numbers of tokens, between which losses fall with the logarithm of the number.

    Losses do so far more than with the number itself, so that what a head keeps is not one of a few numbers.

    Args:
        curves: float `[L, K, N]`.
        grid: ascending, `N`.
        parts: into how many steps each is divided.

    Returns:
        Curves `[L, K, M]`, and the `M` numbers of tokens.
    """
    points = [
        (round(low * (high / low) ** (part / parts)), number)
        for number, (low, high) in enumerate(pairwise(grid))
        for part in range(parts)
    ]
    finer, columns = [], []
    for tokens, number in points:
        if tokens in finer:
            continue
        low, high = grid[number : number + 2]
        weight = math.log(tokens / low) / math.log(high / low)
        columns.append(curves[..., number] * (1 - weight) + curves[..., number + 1] * weight)
        finer.append(tokens)
    if not finer or finer[-1] != grid[-1]:
        finer.append(grid[-1])
        columns.append(curves[..., -1])
    return torch.stack(columns, dim=-1), finer


def losses_at(curves: Tensor, grid: Sequence[int], counts: Tensor) -> Tensor:
    """What each head loses at its number of tokens, interpolated by the logarithm of that number, float64.

    Args:
        curves: float `[L, K, N]`.
        grid: ascending, `N`.
        counts: int `[..., L, K]`, at least 1; beyond the ends of the grid losses stay as they are there.
    """
    at = torch.tensor(grid, dtype=torch.float64).log()
    wanted = counts.double().log().clamp(at[0], at[-1])
    upper = torch.searchsorted(at, wanted.contiguous()).clamp(1, max(1, len(grid) - 1))
    if len(grid) == 1:
        return curves[..., 0].double().expand(counts.shape)
    low, high = at[upper - 1], at[upper]
    table = curves.double().expand(*counts.shape, len(grid))
    before, after = (table.gather(-1, index[..., None])[..., 0] for index in (upper - 1, upper))
    return before + (after - before) * ((wanted - low) / (high - low))


def _slope(start: tuple[int, float], stop: tuple[int, float]) -> float:
    return (stop[1] - start[1]) / (stop[0] - start[0])


def _stretches(head: int, corners: Sequence[tuple[int, float]], lower: int, upper: int) -> Iterator[_Stretch]:
    """The stretches of one head between its bounds, in the order in which they are taken."""
    edges = [(start[0], stop[0], -_slope(start, stop)) for start, stop in pairwise(corners)]
    first = edges[0][2] if edges else 0.0
    edges = [(min(lower, corners[0][0]), corners[0][0], first), *edges]
    edges.append((corners[-1][0], max(upper, corners[-1][0]), 0.0))
    for start, stop, gain in edges:
        tokens = min(stop, upper) - max(start, lower)
        if tokens > 0:
            yield _Stretch(max(0.0, gain), head, tokens)


def _evenly(sizes: Sequence[int], total: int) -> list[int]:
    """`total` tokens in as equal parts as these sizes allow."""
    most = torch.tensor(sizes)
    even = torch.full(most.shape, 1 / len(sizes), dtype=torch.float64)
    return water_filled(even, floor=0, lower=0, upper=most, total=total).tolist()
