"""What one answer loses, for each head and number of rows: measured where that tells something, interpolated elsewhere.

Most heads lose next to nothing, whatever they keep. So the fewest rows and all of them are measured first, and what is
between two numbers of rows only where these differ by more than a tolerance.

Shapes: `L` layers, `K` KV heads, `N` numbers of rows, the last of them all of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor

from headprof.tuning.asked import Asked

_COPIES = 16
"""That are begun with at once, of the heads of as many layers as it takes."""

Losses = dict[int, tuple[float, float]]
"""Of one head, by the index of the number of rows: divergence and drop of log-probability."""


def answer_losses(
    asked: Asked,
    base: Tensor,
    at_base: Tensor,
    grid: Sequence[int],
    tolerance: float,
    on_layers: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Divergence and drop of log-probability, float32 `[2, L, K, N]`.

    Args:
        asked: the answer.
        base: rows that each head keeps while another is looked at, int64 `[L, K]`.
        at_base: divergence and drop where all do, float32 `[2]`.
        grid: numbers of rows, ascending; all of the prompt is added.
        tolerance: divergences that differ by no more are interpolated between, in nats a token.
        on_layers: called with the number of layers that are done.
    """
    layers, heads = base.shape
    step = -(-_COPIES // heads)
    points = [*(min(point, int(asked.whole[0, 0])) for point in grid), int(asked.whole[0, 0])]
    found = torch.empty(2, layers, heads, len(points))
    for first in range(0, layers, step):
        block = range(first, min(first + step, layers))
        for (layer, head), losses in _of_layers(asked, base, at_base, points, tolerance, block).items():
            found[:, layer, head] = interpolated(losses, len(points))
        on_layers(block.stop)
    return found


def _of_layers(
    asked: Asked, base: Tensor, at_base: Tensor, points: Sequence[int], tolerance: float, layers: range
) -> dict[tuple[int, int], Losses]:
    """What is measured for each head of some layers, which are begun with together."""
    known = (float(at_base[0]), float(at_base[1]))
    found: dict[tuple[int, int], Losses] = {
        head: {number: known for number, point in enumerate(points) if point == int(base[head])}
        for head in product(layers, range(base.shape[1]))
    }
    while changes := [
        (head, number) for head, losses in found.items() for number in to_measure(losses, len(points), tolerance)
    ]:
        counts = base.repeat(len(changes), 1, 1)
        for copy, (head, number) in enumerate(changes):
            counts[(copy, *head)] = points[number]
        for (head, number), (divergence, drop) in zip(changes, asked.lost(counts, layers.start).tolist(), strict=True):
            found[head][number] = divergence, drop
    return found


def to_measure(losses: Mapping[int, tuple[float, float]], count: int, tolerance: float) -> list[int]:
    """Which of `count` numbers of rows to look at next: both ends, then halfway between what differs."""
    if missing := [number for number in sorted({0, count - 1}) if number not in losses]:
        return missing
    return [
        (before + after) // 2
        for before, after in pairwise(sorted(losses))
        if after > before + 1 and abs(losses[before][0] - losses[after][0]) > tolerance
    ]


def interpolated(losses: Mapping[int, tuple[float, float]], count: int) -> Tensor:
    """What has been measured, and on straight lines between, by the index of the number, float32 `[2, count]`."""
    found = torch.empty(2, count, dtype=torch.float64)
    for number, pair in losses.items():
        found[:, number] = torch.tensor(pair, dtype=torch.float64)
    for before, after in pairwise(sorted(losses)):
        for number in range(before + 1, after):
            weight = (number - before) / (after - before)
            found[:, number] = found[:, before] * (1 - weight) + found[:, after] * weight
    return found.float()
