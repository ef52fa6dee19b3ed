"""How many tokens each head may keep: one axis of the table of methods.

Shapes: `L` layers, `K` KV heads per layer. A budget is the average number of cached tokens per KV head, the kept end of
the prompt included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from headprof.compression.methods.allocation import headkv_allocation, to_spend, water_filled
from headprof.compression.methods.observation import per_head
from headprof.compression.methods.reduction import largest
from headprof.compression.rows import HeadCounts
from headprof.errors import UsageError
from headprof.profile.kinds import KINDS, named_kinds


class BudgetPolicy(Protocol):
    """How a method spends its budget over the heads: one axis of the table of methods."""

    spreads: bool = False
    """Whether `spread` hands tokens on from head to head."""

    ranks_together: bool = False
    """Whether the rows of all layers together decide how many each head keeps of a prompt (`share_out`)."""

    adds_up: bool = False
    """Whether it adds importances up, so that they must be attention, or a share of it (`Importance.adds_up`)."""

    goes_by_share: bool = False
    """Whether heads' shares of a budget depend on what share of the context it is."""

    follows_content: bool = False
    """Whether what a prompt holds decides how much of it is kept (`by_content`), and the budget is but the most."""

    tuned: bool = False
    """Whether the profile says which parameters the method has (`headprof.profile.tuned`)."""

    @property
    def profile_scores(self) -> str | None:
        """What it needs of a profile: a kind of score, `LEARNED` budgets (`LearnedBudget`), or `None`."""
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

    def by_content(self, ranked: torch.Tensor, attention: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """How many rows each head keeps of a prompt, for a policy that follows what this holds, int64 `[B, K]`.

        As it stands, what it was allotted.

        Args:
            ranked: importance of the rows, float `[B, K, T]`, as for `share_out`.
            attention: that each row can expect (`Assessment.weights`), `[B, K, T]`.
            counts: what `allocate` gave the layer's heads, int64 `[B, K]`; of each sequence they keep no more in all.
        """
        return counts

    def share_out(
        self,
        importance: Sequence[torch.Tensor],
        ranked: Sequence[torch.Tensor],
        totals: Sequence[int],
        noise: float,
    ) -> torch.Tensor:
        """How many rows each head keeps of a prompt, for a policy that ranks those of all layers together.

        Args:
            importance: of each layer that of its rows, float `[B, K, T]`.
            ranked: the same, infinite for the rows that every head keeps, minus infinity where there is no row (see
                `reduction.ranking`).
            totals: rows that all heads of each sequence keep together, `B` numbers; no more than there are.
            noise: the largest difference that means nothing, as a share of the importance.

        Returns:
            int64 `[B, L, K]` on the device of the first layer's; each sequence's sum is its total.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name} shares rows out by no ranking of all layers")


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
        profile_scores: a kind of score: `"retrieval"` (HeadKV), `"reasoning"` (HeadKV-R2), or any other that profiles
            hold; `scores` for short.
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
        if self.profile_scores is not None and self.profile_scores not in KINDS:
            raise UsageError(f"There is no kind of head score named {self.profile_scores!r}: choose {named_kinds()}.")
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


@dataclass(frozen=True)
class TunedBudget(ProfileBudget):
    """As `ProfileBudget`, of a method whose parameters were tuned to the model, those of its importance too."""

    tuned = True
