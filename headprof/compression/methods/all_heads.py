"""What is decided for all heads of a layer together, where each of several processes has some of them.

A process brings what it knows of its own heads, all of them decide the same, and each takes what is its own heads'. In
one process these are the plain calls.

Shapes: `B` sequences, `K` KV heads of a layer, `N` processes, `T` rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headprof.compression.methods.budget import BudgetPolicy
from headprof.compression.methods.observation import per_head
from headprof.compression.rows import HeadCounts
from headprof.models.tensor_parallel import HeadShard


def spread(
    policy: BudgetPolicy,
    shard: HeadShard,
    counts: HeadCounts,
    ranked: Tensor,
    valid: Tensor | None,
    always_kept: int | Tensor,
) -> HeadCounts:
    """`BudgetPolicy.spread` over the heads of all processes; all that is given is of this process's heads."""
    if shard.is_whole:
        return policy.spread(counts, ranked, valid, always_kept)
    there = torch.ones_like(ranked, dtype=torch.bool) if valid is None else per_head(valid).expand(ranked.shape)
    allotted = shard.together(counts.counts, dim=1)
    spread = policy.spread(
        HeadCounts.looked_up(allotted),
        shard.rows_together(ranked, float("-inf")),
        shard.rows_together(there),
        always_kept if isinstance(always_kept, int) else shard.together(always_kept, dim=1),
    )
    return HeadCounts.looked_up(shard.own(spread.counts, dim=1))


def by_content(policy: BudgetPolicy, shard: HeadShard, ranked: Tensor, attention: Tensor, counts: Tensor) -> Tensor:
    """`BudgetPolicy.by_content` of all heads of a prompt; all that is given is of this process's, `[B, K / N, ...]`."""
    of_all = policy.by_content(*(shard.together(each, dim=1) for each in (ranked, attention, counts)))
    return shard.own(of_all, dim=1)
