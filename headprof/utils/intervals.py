"""Intervals for counts, so that no table shows a share without its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi, sin, sqrt, tan
from statistics import fmean, stdev

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


def t_95(degrees: int) -> float:
    """How many standard errors to either side hold 95 % of Student's t distribution."""
    return t_within(0.95, degrees)


def t_within(share: float, degrees: int) -> float:
    """How many standard errors to either side hold this share of Student's t distribution, above 0 and below 1.

    Found by bisection on its distribution function, a finite sum for whole degrees of freedom (Abramowitz and Stegun
    1964, equations 26.7.3 and 26.7.4).
    """
    low, high = 0.0, pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < share else (low, middle)
    return tan(low) * sqrt(degrees)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean; `None` for less than two values.

    Not a bootstrap, whose intervals are too narrow for the few values that one often has the time for.
    """
    if len(values) < 2:
        return None
    half = t_95(len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def mean_at_most(values: Sequence[float], confidence: float) -> float:
    """What a mean is at most, with this confidence (one-sided, above one half), by Student's t.

    Raises:
        ValueError: there are fewer than two values, which do not tell how far others may be from them.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} values have no spread")
    return fmean(values) + t_within(2 * confidence - 1, len(values) - 1) * stdev(values) / sqrt(len(values))


def _t_within(angle: float, degrees: int) -> float:
    """Probability that `|t| < tan(angle) * sqrt(degrees)`."""
    odd = degrees % 2
    term, total = (cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cos(angle) ** 2 * k / (k + 1)
    return (angle + sin(angle) * total) * 2 / pi if odd else sin(angle) * total
