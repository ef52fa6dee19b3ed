"""From scores of heads to whole numbers of tokens that sum exactly: pure functions.

Shapes: `L` layers, `K` KV heads per layer.
"""

from __future__ import annotations

import torch

from headprof.errors import UsageError

_LEAST_SHARE = 1e-30


def normalized(scores: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`scores ** temperature`, divided by their sum over all `L * K` heads; equal shares when all scores are zero.

    The largest score is divided out first, so that no power over- or underflows.
    """
    scores = scores.double()
    largest = scores.max()
    if largest <= 0:
        return torch.full_like(scores, 1 / scores.numel())
    powered = (scores / largest) ** temperature
    return powered / powered.sum()


def water_filled(shares: torch.Tensor, floor: float, lower: int, upper: torch.Tensor, total: int) -> torch.Tensor:
    """Whole numbers `n` that sum to `total` exactly, as near as can be to `floor + shares * x` within bounds.

    `x` is chosen so that what a bound takes from one head is handed to (or taken from) the others in proportion to
    their shares; what no share can take is spread evenly. Rounding is by largest remainder, so a larger share never
    gets less.

    Args:
        shares: non-negative, any shape, float64; sums to one. What is below 1e-30 counts as no share.
        floor: tokens that every head gets before its share.
        lower: fewest tokens of a head.
        upper: most tokens of a head, same shape as `shares`; at least `lower`.
        total: between the sum of the lower and that of the upper bounds.

    Returns:
        int64, the shape of `shares`.
    """
    upper, even = upper.double(), torch.ones_like(shares)
    slope = shares.where(shares > _LEAST_SHARE, 0.0)
    start = torch.full_like(shares, floor)
    if float(torch.minimum(start.clamp(min=lower), upper).sum()) > total:  # the floor alone is too much: lower it
        exact = _risen(torch.zeros_like(shares), even, lower, upper, total)
    else:
        exact = _risen(start, slope, lower, upper, total)
        if float(exact.sum()) < total - 0.5:  # every head that has a share is full
            exact = _risen(exact, even, lower, upper, total)
    return _largest_remainder(exact, shares, total)


def _risen(start: torch.Tensor, slope: torch.Tensor, lower: int, upper: torch.Tensor, total: int) -> torch.Tensor:
    """`start + slope * level` within bounds, at the level from zero up where it sums to `total`, or at the highest.

    The sum is linear between the levels at which a head leaves a bound or meets one, so it is enough to find the two of
    these levels that enclose `total`.
    """

    def risen_to(level: torch.Tensor) -> torch.Tensor:
        return torch.minimum((start + slope * level).clamp(min=lower), upper)

    rising = slope > 0
    divisor = slope.where(rising, 1.0)
    leaves_lower = ((lower - start) / divisor).clamp(min=0)
    meets_upper = ((upper - start) / divisor).clamp(min=0)
    levels = torch.cat([slope.new_zeros(1), leaves_lower[rising], meets_upper[rising]]).sort().values
    below, above = 0, len(levels) - 1
    if float(risen_to(levels[above]).sum()) <= total:
        return risen_to(levels[above])
    while above - below > 1:
        middle = (below + above) // 2
        if float(risen_to(levels[middle]).sum()) < total:
            below = middle
        else:
            above = middle
    held = risen_to(levels[below])
    moving = rising & (leaves_lower <= levels[below]) & (meets_upper >= levels[above])
    return torch.where(moving, held + slope * ((total - held.sum()) / slope[moving].sum()), held)


def _largest_remainder(exact: torch.Tensor, shares: torch.Tensor, total: int) -> torch.Tensor:
    """Round down, then up again where most was lost; of equal losses at the larger share, then at the earlier head."""
    # In whole millionths, so that the noise of floating point does not decide between equal remainders.
    millionths = (exact.flatten() * 1e6).round().long()
    counts, lost = millionths // 10**6, millionths % 10**6
    order = shares.flatten().argsort(descending=True, stable=True)
    order = order[lost[order].argsort(descending=True, stable=True)]
    counts[order[: total - int(counts.sum())]] += 1
    return counts.reshape(exact.shape)


def to_spend(budget: int, always_kept: int) -> int:
    """What of a head's budget is free to go where it matters; raises `UsageError` when it does not cover the rest."""
    if budget < always_kept:
        raise UsageError(
            f"A budget of {budget} tokens is below the {always_kept} that every head keeps: raise --budget, or lower "
            "--keep-last."
        )
    return budget - always_kept


def headkv_allocation(
    scores: torch.Tensor,
    *,
    budget: int,
    context_length: int,
    always_kept: int,
    pool_factor: float = 1.005,
    temperature: float = 1.0,
    minimum: int = 0,
) -> torch.Tensor:
    """HeadKV's budgets (Fu et al. 2025, "Not All Heads Matter", section 3.3), on KV heads and with an exact sum.

    With `base = budget - always_kept`, every head keeps `base * (1 - 1/pool_factor)` tokens and draws the rest from the
    pool `base/pool_factor * L * K` in proportion to its score, beside the tokens that are always kept. Heads never hold
    more than the context; the surplus goes to the others.

    Args:
        scores: importance of each KV head, non-negative float `[L, K]`; only ratios matter.
        budget: average tokens per KV head.
        context_length: tokens of the prompt, `T`.
        always_kept: tokens that every head keeps (the end of the prompt and the attention sinks).
        pool_factor: the paper's `beta`, at least 1; large values approach equal budgets.
        temperature: exponent on the scores; 0 gives equal budgets.
        minimum: fewest tokens a head gets beside those always kept.

    Returns:
        int64 `[L, K]` that sums to `min(budget, T) * L * K`.

    Raises:
        UsageError: the budget is smaller than what every head must keep.
    """
    if budget >= context_length:
        return torch.full(scores.shape, context_length, dtype=torch.int64)
    base = to_spend(budget, always_kept)
    floor = always_kept + base * (1 - 1 / pool_factor)
    return water_filled(
        normalized(scores, temperature),
        floor=floor,
        lower=always_kept + min(minimum, base),
        upper=torch.full(scores.shape, context_length),
        total=budget * scores.numel(),
    )
