"""How many tokens each head may keep: pure functions from scores to whole numbers that sum exactly.

Shapes: `L` layers, `K` KV heads per layer. A budget is the average number of cached tokens per KV head, the kept end of
the prompt included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Protocol

import torch

from headprof.compression.methods.observation import per_head
from headprof.compression.methods.reduction import largest
from headprof.compression.rows import HeadCounts
from headprof.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_LEAST_SHARE = 1e-30
_LARGEST = 1e15  # of a number in a budget, so that no arithmetic with it overflows
_RATIO = "ratio "
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|(?:[KMG]I?)?B)?", re.IGNORECASE)


_THRESHOLD = re.compile(r">\s*(?P<above>[^/]*?)\s*(?:/\s*(?P<most>.+))?")


def _number(text: str) -> float | None:
    """A number from 0 on that is no trouble; `None` for anything else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < _LARGEST else None


@dataclass(frozen=True)
class Budget:
    """A budget as the user gave it: tokens per KV head, a share of the prompt, or bytes for the whole cache.

    Attributes:
        amount: how much.
        unit: `"tokens"`, `"share"` (of one) or `"bytes"`.
        above: what a row's importance must exceed to be kept of a prompt; then the amount is but the most that may be,
            and what the prompt holds decides how much is. `None` to keep as much as there may be.
    """

    amount: float
    unit: str
    above: float | None = None

    def __repr__(self) -> str:
        """As it was before there were thresholds, where there is none: kept results are told apart by it."""
        above = "" if self.above is None else f", above={self.above!r}"
        return f"Budget(amount={self.amount!r}, unit={self.unit!r}{above})"

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """Read `64` (tokens per KV head), `1.5%` (of the prompt) or `512MB` (`kB`, `MB`, `GB`, `KiB`, `MiB`, `GiB`).

        `>0.01` keeps all rows whose importance is above 0.01, and `>0.01/25%` at most 25 % of the prompt of them.
        `ratio 0.75` is the share of the prompt's cache that is removed, as `--compression-ratio` gives it.

        Raises:
            UsageError: the text is none of these, or not above zero.
        """
        if isinstance(text, Budget):
            return text
        if str(text).startswith(_RATIO):
            return cls(_kept_share(str(text).removeprefix(_RATIO).strip()), "share")
        if (given := _THRESHOLD.fullmatch(str(text).strip())) is not None:
            above = _number(given["above"])
            if above is None or (given["most"] or "").startswith(">"):
                raise UsageError(
                    f"A threshold of {str(text)!r} cannot be read: give an importance (>0.01), and after it what may "
                    "be kept at most (>0.01/25%), if that is to have a bound."
                )
            return replace(cls.parse(given["most"] or "100%"), above=above)
        match = _BUDGET.fullmatch(str(text).strip())
        if match is None or not 0 < float(match["number"]) < _LARGEST:
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


def ratio_budget(ratio: str) -> str:
    """The budget that leaves a share of the prompt's cache out, as `Budget.parse` reads it and tables show it."""
    return f"{_RATIO}{ratio.strip()}"


def _kept_share(ratio: str) -> float:
    """What a compression ratio leaves: the number next to 1 - `ratio`, without the rounding of binary fractions."""
    try:
        removed = Decimal(ratio)
    except InvalidOperation:
        removed = Decimal("NaN")
    kept = float(1 - removed) if removed.is_finite() and 0 <= removed < 1 else 0.0
    if not kept:
        raise UsageError(
            f"A compression ratio of {ratio!r} is no share of the cache to remove: give 0 or more, but less than 1, "
            "such as 0.75."
        )
    return kept


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


class BudgetPolicy(Protocol):
    """How a method spends its budget over the heads: one axis of the table of methods."""

    spreads: bool = False
    """Whether `spread` hands tokens on from head to head."""

    ranks_together: bool = False
    """Whether one ranking over all layers decides how many tokens each head keeps of a prompt (`GlobalBudget`)."""

    goes_by_share: bool = False
    """Whether heads' shares of a budget depend on what share of the context it is."""

    @property
    def profile_scores(self) -> str | None:
        """What it needs of a profile: `"retrieval"` or `"reasoning"` scores, `"reconstruction"`, or `None`."""
        ...

    def allocate(self, scores: torch.Tensor, *, budget: int, context_length: int, always_kept: int) -> torch.Tensor:
        """Tokens per KV head, int64 `[L, K]`, summing to `min(budget, context_length) * L * K`.

        Args:
            scores: `[L, K]`, the profile's, or anything of that shape for a policy that needs none.
            budget: average tokens per KV head.
            context_length: tokens of the prompt.
            always_kept: tokens that every head keeps.

        Raises:
            UsageError: the budget is smaller than what every head must keep.
        """
        ...

    def spread(
        self, counts: HeadCounts, importance: torch.Tensor, valid: torch.Tensor | None, always_kept: int | torch.Tensor
    ) -> HeadCounts:
        """Hand one layer's tokens on between its heads, once their importance is known; as it stands, leave them.

        Args:
            counts: what `allocate` gave the layer's heads; of each sequence at most its valid tokens in all.
            importance: float `[B, K, T]`; infinite for the tokens that every head keeps (see `reduction.ranking`).
            valid: false where a token is padding, bool `[B, T]`, or `[B, K, T]` if heads differ; `None` if none is.
            always_kept: tokens that every head keeps; of each head, int64 `[B, K]`, where some tokens are protected.

        Returns:
            As many in all, in each head at most its valid tokens.
        """
        return counts


@dataclass(frozen=True)
class UniformBudget(BudgetPolicy):
    """Every head keeps the same number of tokens (SnapKV, Li et al. 2024, and most others)."""

    profile_scores: str | None = None

    def allocate(self, scores: torch.Tensor, *, budget: int, context_length: int, always_kept: int) -> torch.Tensor:
        return headkv_allocation(
            torch.ones_like(scores), budget=budget, context_length=context_length, always_kept=always_kept
        )


@dataclass(frozen=True)
class PyramidBudget(BudgetPolicy):
    """Layers keep linearly fewer tokens from the first to the last, their heads alike (PyramidKV, Cai et al. 2024).

    With `base = budget - always_kept`, the last layer keeps `base / taper` tokens and the first
    `2 * base - base / taper`, beside those that every head keeps. No layer holds more than the context; the surplus
    goes to the others in proportion.

    Attributes:
        taper: the paper's `beta`, at least 1; 1 gives equal budgets.
    """

    profile_scores: str | None = None
    taper: float = 20.0

    def __post_init__(self) -> None:
        if self.taper < 1:
            raise UsageError(f"A taper of {self.taper} would turn the pyramid over: give at least 1.")

    def allocate(self, scores: torch.Tensor, *, budget: int, context_length: int, always_kept: int) -> torch.Tensor:
        num_layers, num_kv_heads = scores.shape
        if budget >= context_length:
            return torch.full(scores.shape, context_length, dtype=torch.int64)
        to_spend(budget, always_kept)
        heights = torch.linspace(2 - 1 / self.taper, 1 / self.taper, num_layers, dtype=torch.float64)
        layers = water_filled(
            heights / heights.sum(),
            floor=always_kept,
            lower=always_kept,
            upper=torch.full_like(heights, context_length),
            total=budget * num_layers,
        )
        return layers[:, None].repeat(1, num_kv_heads)


@dataclass(frozen=True)
class AdaptiveBudget(UniformBudget):
    """Heads of a layer share its tokens by where the layer's most important ones lie (AdaKV, Feng et al. 2024).

    Each head first takes its most important tokens, up to its safeguard; what remains of the layer's total goes to the
    most important of all other tokens, whichever head they belong to (of equal ones the earlier token, then the earlier
    head). The paper's safeguard is a weighted mean with equal budgets; ours is the least that a head may have.

    Attributes:
        safeguard: share of its equal budget, beside the tokens always kept, that a head never goes below; 0 to 1.
    """

    safeguard: float = 0.2
    spreads = True

    def __post_init__(self) -> None:
        if not 0 <= self.safeguard <= 1:
            raise UsageError(f"A safeguard of {self.safeguard} is no share of a budget: give 0 to 1.")

    def spread(
        self, counts: HeadCounts, importance: torch.Tensor, valid: torch.Tensor | None, always_kept: int | torch.Tensor
    ) -> HeadCounts:
        allotted, tokens = counts.counts, importance.shape[-1]
        spare = (allotted - always_kept).clamp(min=0)
        least = allotted - spare + (spare.double() * self.safeguard).long()
        ranked, total = importance, allotted.sum(dim=-1)
        if valid is not None:
            valid = per_head(valid)
            held = valid.sum(dim=-1)
            least, total = least.minimum(held), total.minimum(held.expand_as(allotted).sum(dim=-1))
            ranked = importance.masked_fill(~valid, float("-inf"))
        elif counts.most > tokens:
            least, total = least.clamp(max=tokens), total.clamp(max=tokens * allotted.shape[1])
        ranked = ranked.masked_fill(largest(ranked, least, most=counts.most), float("inf"))
        most = min(counts.total, counts.most * allotted.shape[1])
        chosen = largest(ranked.transpose(1, 2).flatten(1), total, most=most)  # [B, T * K]
        spread = chosen.unflatten(1, (-1, allotted.shape[1])).sum(dim=1)
        return HeadCounts(spread, min(most, tokens), counts.total)


@dataclass(frozen=True)
class ProfileBudget(BudgetPolicy):
    """Heads keep tokens in proportion to their score in a head profile (HeadKV and HeadKV-R2, Fu et al. 2025).

    Attributes:
        profile_scores: `"retrieval"` (HeadKV) or `"reasoning"` (HeadKV-R2).
        pool_factor: the paper's `beta`.
        temperature: exponent on the scores.
        minimum: fewest tokens of a head beside those that every head keeps.
        aggregate: how a KV head's score is made from its query heads': `"max"` or `"mean"`.
    """

    profile_scores: str | None = "reasoning"
    pool_factor: float = 1.4
    temperature: float = 0.5
    minimum: int = 2
    aggregate: str = "max"

    def __post_init__(self) -> None:
        if self.pool_factor < 1:
            raise UsageError(f"A pool factor of {self.pool_factor} would give heads less than nothing: give 1 or more.")
        if self.temperature < 0 or self.minimum < 0:
            raise UsageError("Temperature and minimum cannot be below 0: give 0 or more.")
        if self.aggregate not in ("max", "mean"):
            raise UsageError(f"Scores of a group cannot be joined by {self.aggregate!r}: choose max or mean.")

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
