"""Intervals for counts, so that no table shows a share without its uncertainty."""

from __future__ import annotations

from math import sqrt

Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a share, from 0 to 1 (Wilson 1927); 95 % by default.

    Unlike the normal approximation it stays within bounds, also when all trials succeed or fail.

    Raises:
        ValueError: `trials` is not positive, or `successes` is not between 0 and `trials`.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    share = successes / trials
    denominator = 1 + z * z / trials
    center = (share + z * z / (2 * trials)) / denominator
    half = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / denominator
    return max(0.0, center - half), min(1.0, center + half)
