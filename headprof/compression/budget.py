"""How many tokens each head may keep: pure functions from scores to whole numbers that sum exactly.

Shapes: `L` layers, `K` KV heads per layer. A budget is the average number of cached tokens per KV head, the kept end of
the prompt included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch

from headprof.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|(?:[KMG]I?)?B)?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A budget as the user gave it: tokens per KV head, a share of the prompt, or bytes for the whole cache."""

    amount: float
    unit: str  # "tokens", "share" (of one), "bytes"

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """Read `64` (tokens per KV head), `1.5%` (of the prompt) or `512MB` (`kB`, `MB`, `GB`, `KiB`, `MiB`, `GiB`).

        Raises:
            UsageError: the text is none of these, or not above zero.
        """
        if isinstance(text, Budget):
            return text
        match = _BUDGET.fullmatch(str(text).strip())
        if match is None or float(match["number"]) <= 0:
            raise UsageError(
                f"A budget of {str(text)!r} cannot be read: give tokens per KV head (64), a share of the prompt (1.5%) "
                "or bytes for the whole cache (512MB)."
            )
        amount, unit = float(match["number"]), (match["unit"] or "").upper()
        if unit == "%":
            if amount > 100:
                raise UsageError(f"A budget of {text} is more than the prompt: give at most 100%.")
            return cls(amount / 100, "share")
        if unit:
            return cls(amount * _UNITS[unit.removesuffix("B")], "bytes")
        if amount != int(amount):
            raise UsageError(
                f"A budget of {text} tokens is not a whole number: round it, or write {text}% for a share."
            )
        return cls(amount, "tokens")

    def tokens(self, prompt_length: int, bytes_per_token: int) -> int:
        """Tokens per KV head.

        Args:
            prompt_length: tokens of the prompt.
            bytes_per_token: bytes that one token takes in the full cache, over all layers and KV heads.
        """
        if self.unit == "share":
            return max(1, round(self.amount * prompt_length))
        if self.unit == "bytes":
            return int(self.amount // bytes_per_token)
        return int(self.amount)


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
        shares: non-negative, any shape, float64; sums to one.
        floor: tokens that every head gets before its share.
        lower: fewest tokens of a head.
        upper: most tokens of a head, same shape as `shares`; at least `lower`.
        total: between the sum of the lower and that of the upper bounds.

    Returns:
        int64, the shape of `shares`.
    """
    upper = upper.double()

    def filled(share_level: float, even_level: float) -> torch.Tensor:
        return torch.minimum((floor + even_level + shares * share_level).clamp(min=lower), upper)

    # Nothing above this level changes any head that has a share at all.
    highest = float(upper.max()) / max(float(shares[shares > 0].min()), 1e-12)
    if float(filled(highest, 0.0).sum()) >= total:
        level = _bisected(lambda level: float(filled(level, 0.0).sum()), total, highest)
        exact = filled(level, 0.0)
    else:
        level = _bisected(lambda level: float(filled(highest, level).sum()), total, float(upper.max()))
        exact = filled(highest, level)
    if float(filled(0.0, 0.0).sum()) > total:  # the floor alone is too much: lower it
        level = _bisected(lambda level: float(filled(0.0, level - floor).sum()), total, floor)
        exact = filled(0.0, level - floor)
    return _largest_remainder(exact, upper, shares, total)


def _bisected(sum_at, total: int, highest: float) -> float:
    """The level at which a non-decreasing sum reaches `total`."""
    low, high = 0.0, highest
    for _ in range(200):
        middle = (low + high) / 2
        if sum_at(middle) < total:
            low = middle
        else:
            high = middle
    return high


def _largest_remainder(exact: torch.Tensor, upper: torch.Tensor, shares: torch.Tensor, total: int) -> torch.Tensor:
    exact = (exact * 1e6).round() / 1e6  # bisection noise must not decide between equal heads
    whole = exact.floor()
    order = sorted(
        range(exact.numel()),
        key=lambda head: (-float((exact - whole).flatten()[head]), -float(shares.flatten()[head]), head),
    )
    counts = whole.long().flatten()
    bounds = upper.long().flatten()
    missing = total - int(counts.sum())
    while missing != 0:
        step = 1 if missing > 0 else -1
        for head in order if step > 0 else reversed(order):
            if missing == 0:
                break
            if step < 0 or counts[head] < bounds[head]:
                counts[head] += step
                missing -= step
    return counts.reshape(exact.shape)


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
    if budget < always_kept:
        raise UsageError(
            f"A budget of {budget} tokens is below the {always_kept} that every head keeps: raise --budget, or lower "
            "--keep-last."
        )
    base = budget - always_kept
    floor = always_kept + base * (1 - 1 / pool_factor)
    return water_filled(
        normalized(scores, temperature),
        floor=floor,
        lower=always_kept + min(minimum, base),
        upper=torch.full(scores.shape, context_length),
        total=budget * scores.numel(),
    )


class BudgetPolicy(Protocol):
    """How a method spends its budget over the heads: one axis of the table of methods."""

    @property
    def profile_scores(self) -> str | None:
        """Which of a profile's scores it needs: `"retrieval"`, `"reasoning"` or none."""
        ...

    def allocate(self, scores: torch.Tensor, *, budget: int, context_length: int, always_kept: int) -> torch.Tensor:
        """Tokens per KV head, int64 `[L, K]`, summing to `min(budget, context_length) * L * K`.

        Args:
            scores: `[L, K]`, the profile's, or anything of that shape for a policy that needs none.
            budget: average tokens per KV head.
            context_length: tokens of the prompt.
            always_kept: tokens that every head keeps.
        """
        ...


@dataclass(frozen=True)
class UniformBudget:
    """Every head keeps the same number of tokens (SnapKV, Li et al. 2024, and most others)."""

    profile_scores: str | None = None

    def allocate(self, scores: torch.Tensor, *, budget: int, context_length: int, always_kept: int) -> torch.Tensor:
        return headkv_allocation(
            torch.ones_like(scores), budget=budget, context_length=context_length, always_kept=always_kept
        )


@dataclass(frozen=True)
class ProfileBudget:
    """Heads keep tokens in proportion to their score in a head profile (HeadKV and HeadKV-R2, Fu et al. 2025).

    Attributes:
        profile_scores: `"retrieval"` (HeadKV) or `"reasoning"` (HeadKV-R2).
        pool_factor: the paper's `beta`.
        temperature: exponent on the scores.
        minimum: fewest tokens of a head beside those that every head keeps.
        aggregate: how a KV head's score is made from its query heads': `"max"` or `"mean"`.
    """

    profile_scores: str | None = "reasoning"
    pool_factor: float = 1.5
    temperature: float = 0.6
    minimum: int = 2
    aggregate: str = "max"

    def allocate(self, scores: torch.Tensor, *, budget: int, context_length: int, always_kept: int) -> torch.Tensor:
        return headkv_allocation(
            scores,
            budget=budget,
            context_length=context_length,
            always_kept=always_kept,
            pool_factor=self.pool_factor,
            temperature=self.temperature,
            minimum=self.minimum,
        )
