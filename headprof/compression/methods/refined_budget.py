"""Budgets that were moved, for one model, to where they lose less of what is asked.

Shapes: `L` layers, `K` KV heads per layer, `S` budgets at which that was done.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from headprof.compression.methods.allocation import normalized, to_spend, water_filled
from headprof.compression.methods.budget import BudgetPolicy
from headprof.profile.refined_rows import REFINED_ROWS


@dataclass(frozen=True)
class RefinedBudget(BudgetPolicy):
    """Heads keep as many tokens as lose the least together, by gradients on probes (`headprof.tuning.moving`).

    A profile holds them for some budgets, in tokens; budgets between two of these are interpolated. What a budget has
    beyond the largest goes to all heads alike.
    """

    profile_scores = REFINED_ROWS
    tuned = True

    def allocate(self, scores: Tensor, *, budget: int, context_length: int, always_kept: int) -> Tensor:
        """As `BudgetPolicy.allocate`; `scores` are `[S, L, K]`, budgets ascending (`headprof.profile.refined_rows`)."""
        full = torch.full(scores.shape[1:], context_length)
        if budget >= context_length:
            return full
        to_spend(budget, always_kept)
        largest = max(float(scores[-1].double().mean()), always_kept)
        floor = always_kept + max(0.0, budget - largest)
        shares, total = shares_at(scores, budget), budget * full.numel()
        return water_filled(shares, floor=floor, lower=always_kept, upper=full, total=total)


def shares_at(rows: Tensor, budget: float) -> Tensor:
    """What part of a budget each head gets, float64 `[L, K]`, of which the sum is one.

    Args:
        rows: `[S, L, K]`, each mean larger than the one before.
        budget: tokens per KV head; below the first and above the last the shares are theirs.
    """
    budgets = rows.double().mean(dim=(1, 2))
    upper = int(torch.searchsorted(budgets, float(budget)))
    if upper == 0 or upper == len(budgets):
        return normalized(rows[min(upper, len(budgets) - 1)])
    low, high = float(budgets[upper - 1]), float(budgets[upper])
    weight = log(budget / low) / log(high / low)
    return (1 - weight) * normalized(rows[upper - 1]) + weight * normalized(rows[upper])
