"""One ranking of the rows of all heads of all layers together.

Shapes: `L` layers, `B` sequences, `K` KV heads per layer, `T` tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headprof.compression.methods.budget import UniformBudget
from headprof.compression.methods.reduction import largest


@dataclass(frozen=True)
class GlobalBudget(UniformBudget):
    """The most important rows of all heads of all layers are kept, wherever they lie (KVzip, Kim et al. 2025).

    Every head keeps its sinks and last tokens; what is left of the whole cache's total goes to the most important of
    all other rows. All layers must have been judged before the first row goes, so a prompt is read twice: the first
    time nothing but the importance of its rows is kept, and the second time each head keeps its best ones, as many as
    the one ranking gave it (`ranked_together`). While text is generated, heads share the budget in these proportions
    (`CompressionPlan.shares`).
    """

    ranks_together = True

    def share_out(
        self,
        importance: Sequence[torch.Tensor],
        ranked: Sequence[torch.Tensor],
        totals: Sequence[int],
        noise: float,
    ) -> torch.Tensor:
        return ranked_together(ranked, totals, noise)


def ranked_together(ranked: Sequence[torch.Tensor], totals: Sequence[int], noise: float) -> torch.Tensor:
    """How many rows each head keeps where one ranking over all of them decides.

    Args:
        ranked: of each layer the importance of its rows, float `[B, K, T]`; infinite for those that every head keeps,
            minus infinity where there is no row (see `reduction.ranking`).
        totals: rows that all heads of each sequence keep together, `B` numbers; no more than there are.
        noise: the largest difference that means nothing, as a share of the importance.

    Returns:
        int64 `[B, L, K]` on the device of the first layer's; each sequence's sum is its total. Of equal rows the
        earlier token is kept, then the earlier layer, then the earlier head.
    """
    device = ranked[0].device
    together = torch.stack([each.to(device) for each in ranked], dim=1)  # [B, L, K, T]
    batch, layers, heads, tokens = together.shape
    in_order = together.permute(0, 3, 1, 2).reshape(batch, -1)
    kept = largest(in_order, torch.tensor(totals, device=device), noise, most=max(totals))
    return kept.view(batch, tokens, layers, heads).sum(dim=1)
