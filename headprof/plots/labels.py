"""Keeping the labels of lines apart."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spread(heights: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Heights of labels in the same order, between `low` and `high`, at least `apart`, and as near as can be.

    Near is the least sum of squares: isotonic regression by pooling adjacent violators. Where there is too little room
    they stand as far apart as it allows.
    """
    apart = min(apart, (high - low) / max(1, len(heights) - 1))
    order = sorted(range(len(heights)), key=heights.__getitem__)
    pools: list[list[float]] = []  # of heights as they would be if labels needed no room
    for rank, index in enumerate(order):
        pools.append([heights[index] - rank * apart])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    free = [_mean(pool) for pool in pools for _ in pool]
    highest = high - apart * (len(heights) - 1)
    placed = [0.0] * len(heights)
    for rank, index in enumerate(order):
        placed[index] = min(max(free[rank], low), highest) + rank * apart
    return placed


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
