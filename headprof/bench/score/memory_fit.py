"""How peak memory grows with the length: curves through what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MemoryLine:
    """The least-squares line through peak memory at several lengths.

    Attributes:
        bytes_per_token: its slope.
        r_squared: share of the variance that it explains; 1 is a line.
        lengths: how many it is drawn through.
    """

    bytes_per_token: float
    r_squared: float
    lengths: int


def memory_slope(points: Sequence[tuple[int, int]]) -> MemoryLine | None:
    """The least-squares line of peak bytes against length; `None` for fewer than three lengths, which prove no line."""
    if len(points) < 3:
        return None
    lengths, peaks = np.array(points, dtype=np.float64).T
    slope, start = np.polyfit(lengths, peaks, 1)
    spread = ((peaks - peaks.mean()) ** 2).sum()
    missed = ((peaks - start - slope * lengths) ** 2).sum()
    return MemoryLine(float(slope), float(1 - missed / spread) if spread else 1.0, len(points))


def limit_length(points: Sequence[tuple[int, int]], limit_bytes: float) -> int | None:
    """The length at which the least-squares parabola through peak memory comes to `limit_bytes`: an extrapolation.

    Args:
        points: length in tokens and peak bytes.
        limit_bytes: as many as there are beside the weights.

    Returns:
        tokens; `None` for fewer than three lengths, or if the parabola does not get there within a hundred times the
        longest of them.
    """
    if len(points) < 3:
        return None
    lengths, peaks = np.array(points, dtype=np.float64).T
    roots = np.roots(np.polyfit(lengths, peaks, 2) - [0, 0, limit_bytes])
    reached = [root.real for root in roots if abs(root.imag) < 1e-6 and 0 < root.real < 100 * lengths.max()]
    return int(min(reached)) if reached else None
