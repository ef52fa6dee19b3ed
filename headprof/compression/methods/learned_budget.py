"""Budgets learned from the one ranking of all heads' rows, so that one reading of a document is enough.

Shapes: `L` layers, `K` KV heads per layer, `S` shares at which the ranking was taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.compression.methods.allocation import normalized, to_spend, water_filled
from headprof.compression.methods.budget import BudgetPolicy, ProfileBudget
from headprof.errors import UsageError

LEARNED = "learned"
"""What these budgets need of a profile, made by `headprof score --reconstruction`."""


@dataclass(frozen=True)
class LearnedBudget(BudgetPolicy):
    """Heads keep what they kept of other texts, on average, where the rows of all heads were ranked together.

    That ranking is `GlobalBudget`'s, which needs the importance of all layers' rows before the first row goes. How many
    tokens it gives each head depends far more on the head than on the text, so it can be known before: a profile holds
    it for some shares that all heads keep together, and shares between them are interpolated.

    Attributes:
        mix: 0 to 1: the weight of HeadKV-R2's budgets in a geometric mean with the learned ones.
    """

    mix: float = 0.0

    profile_scores = LEARNED
    goes_by_share = True

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise UsageError(f"A mix of {self.mix} is no weight of one of two: give 0 to 1.")

    def allocate(self, scores: Tensor, *, budget: int, context_length: int, always_kept: int) -> Tensor:
        """As `BudgetPolicy.allocate`; `scores` are `[S, L, K]`, and the reasoning scores after them if there is a mix.

        `S` shares are from 0 to 1 and ascending (see `headprof.profile.kept_shares`).
        """
        learned, full = scores[:-1] if self.mix else scores, torch.full(scores.shape[1:], context_length)
        if budget >= context_length:
            return full
        sizes = {"budget": budget, "context_length": context_length, "always_kept": always_kept}
        share = to_spend(budget, always_kept) / (context_length - always_kept)
        shares = normalized(kept_at(learned, share))
        if self.mix:
            others = normalized(ProfileBudget().allocate(scores[-1], **sizes) - always_kept)
            shares = normalized(shares ** (1 - self.mix) * others**self.mix)
        return water_filled(shares, floor=always_kept, lower=always_kept, upper=full, total=budget * full.numel())


def kept_at(learned: Tensor, share: float) -> Tensor:
    """What share each head keeps where all keep `share` together, float64 `[L, K]`, whose mean is that.

    Between two shares that are known it is interpolated; before the first nothing is kept, after the last everything.

    Args:
        learned: `[S, L, K]`, each mean larger than the one before.
        share: 0 to 1.
    """
    ends = torch.zeros_like(learned[:1]).double(), torch.ones_like(learned[:1]).double()
    known = torch.cat([ends[0], learned.double(), ends[1]])
    at = known.mean(dim=(1, 2))
    upper = int(torch.searchsorted(at[1:-1].contiguous(), share)) + 1
    low, high = float(at[upper - 1]), float(at[upper])
    weight = (share - low) / (high - low) if high > low else 1.0
    return known[upper - 1] + weight * (known[upper] - known[upper - 1])
