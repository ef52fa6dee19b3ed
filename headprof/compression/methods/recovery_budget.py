"""Budgets by what a head needs to keep its attention: the smallest of several policies that recovers enough of it.

Shapes: `B` sequences, `K` KV heads per layer, `T` tokens of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.compression.methods.budget import UniformBudget
from headprof.compression.methods.policy_order import POLICIES, kept_by
from headprof.errors import UsageError


@dataclass(frozen=True)
class RecoveryBudget(UniformBudget):
    """Each head keeps the rows of the smallest policy that recovers enough of its attention (FastGen, Ge et al. 2024).

    "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs", arXiv 2310.01801. The policies are those
    of `PolicyOrder`: special tokens; these and punctuation; these and heavy hitters; these and the last rows; all rows.
    What a policy recovers is the share of the attention of all of the prompt's queries that lies on its rows and those
    that every head keeps. A KV head's attention is that of its group's query heads together: the mean of their shares,
    as each of them pays the same in all. (The paper compares whole matrices, in which the last rows are those before
    each query; here they are the last of the prompt, which is what a head is left with.)

    So a prompt decides what is spent, and the budget is but the most: where the heads of a layer need more than its
    equal part of the budget, all of them are cut to one length, those that need less than that aside. What heads have
    kept of a prompt they hold from then on.

    Attributes:
        recovery: the share of its attention that a head's rows recover at least, above 0; 1 keeps all rows.
    """

    recovery: float = 0.85

    def __post_init__(self) -> None:
        if not 0 < self.recovery <= 1:
            raise UsageError(
                f"A recovery of {self.recovery} is no share of a head's attention: give more than 0, up to 1."
            )

    @property
    def follows_content(self) -> bool:  # type: ignore[override]
        return self.recovery < 1

    def by_content(self, ranked: Tensor, attention: Tensor, counts: Tensor) -> Tensor:
        sizes = torch.stack([kept_by(policy, ranked).sum(dim=-1) for policy in range(len(POLICIES))])
        chosen = self.policies(ranked, attention)
        return cut_to(sizes.gather(0, chosen[None])[0], counts.sum(dim=-1))

    def policies(self, ranked: Tensor, attention: Tensor) -> Tensor:
        """Which of `POLICIES` each head takes, int64 `[B, K]`.

        Args:
            ranked: what a `PolicyOrder` says of the rows, `[B, K, T]`, as `reduction.ranking` has it.
            attention: that each row has received, at least 0, `[B, K, T]`.
        """
        there = attention.double().masked_fill(ranked == float("-inf"), 0.0)
        sums = [(there * kept_by(policy, ranked)).sum(dim=-1) for policy in range(len(POLICIES) - 1)]
        too_little = torch.stack(sums) < self.recovery * there.sum(dim=-1)
        if not self.follows_content:
            too_little = torch.ones_like(too_little)  # rows without any attention count too
        return too_little.long().cumprod(dim=0).sum(dim=0)


def cut_to(needed: Tensor, totals: Tensor) -> Tensor:
    """What heads get of what they need, where all of them together may have no more than so many rows.

    Heads that need more than the others are cut to one length, so that none gets less than another that needs less;
    rows that are left over go one by one to the earlier of those that are cut.

    Args:
        needed: of each head, int64 `[B, K]`.
        totals: of each sequence, int64 `[B]`.

    Returns:
        int64 `[B, K]`, at most `needed`; the sum is the smaller of its sum and the total.
    """
    heads = needed.shape[1]
    ascending = needed.sort(dim=-1).values
    before = ascending.cumsum(dim=-1) - ascending
    left = heads - torch.arange(heads, device=needed.device)
    levels = (totals[:, None] - before) // left  # if a head and all that need more are cut
    whole = (ascending <= levels).long().cumprod(dim=-1).sum(dim=-1, keepdim=True)
    level = levels.gather(1, whole.clamp(max=heads - 1)).where(whole < heads, ascending[:, -1:])
    cut = needed.minimum(level)
    short = needed > level
    return cut + (short & (short.cumsum(dim=-1) <= (totals - cut.sum(dim=-1))[:, None]))
