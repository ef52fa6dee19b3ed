"""One share of the attention for all layers, each of which keeps as few of its best rows as make up this share.

Shapes: `L` layers, `B` sequences, `K` KV heads per layer, `T` tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.compression.methods.budget import UniformBudget
from headprof.compression.methods.reduction import largest
from headprof.errors import UsageError

UNITS = ("layer", "head")


@dataclass(frozen=True)
class PrefixBudget(UniformBudget):
    """Every layer keeps the same share of its attention (PrefixKV, Wang et al. 2024, arXiv 2412.03409).

    A layer's rows stand in order of importance, after those that are kept in any case. It keeps the shortest prefix of
    them that makes up the share `p` of the layer's total importance, `p` being such that the rows of all layers sum to
    the budget. A layer whose attention lies on few rows is thus left with few.

    The paper finds `p` by bisection. A row is within the prefix as soon as those before it make up less than `p`, so
    what bisection closes in on is the `n` rows, `n` being the whole cache's total, before which least of their
    layer's attention lies; these are taken at once (`prefix_counts`). So the sum is exact where several layers reach
    `p` with the same row, or where a row more would be too many: of rows before which equally much lies, those go
    first that stand earlier in their layer's order, then those of the earlier layer, then of the earlier head.

    All layers must have been judged before the first row goes, so a prompt is read twice, as for `GlobalBudget`.

    Attributes:
        per: whose rows are one order: those of a `"layer"`, as in the paper, or of each KV `"head"` by itself.
    """

    per: str = "layer"
    ranks_together = True
    adds_up = True

    def __post_init__(self) -> None:
        if self.per not in UNITS:
            raise UsageError(f"Attention cannot be added up per {self.per!r}: choose {' or '.join(UNITS)}.")

    def share_out(
        self, importance: Sequence[Tensor], ranked: Sequence[Tensor], totals: Sequence[int], noise: float
    ) -> Tensor:
        return prefix_counts(importance, ranked, totals, noise, self.per)


def prefix_counts(
    importance: Sequence[Tensor], ranked: Sequence[Tensor], totals: Sequence[int], noise: float, per: str = "layer"
) -> Tensor:
    """How many rows each head keeps where all layers, or heads, keep one share of their importance.

    Args:
        importance: of each layer that of its rows, float `[B, K, T]`, at least 0.
        ranked: the same; infinite for rows that every head keeps, minus infinity where there is no row (see
            `reduction.ranking`).
        totals: rows that all heads of each sequence keep together, `B` numbers; no more than there are.
        noise: the largest difference that means nothing, as a share of what is compared.
        per: `"layer"` or `"head"`.

    Returns:
        int64 `[B, L, K]` on the device of the first layer's; each sequence's sum is its total.
    """
    device = ranked[0].device
    batch, heads = ranked[0].shape[:2]
    pairs = zip(importance, ranked, strict=True)
    orders = [_unmet(_by_unit(own, per), _by_unit(order, per)).to(device) for own, order in pairs]
    unmet = torch.stack(orders, dim=1).flatten(1, 2)  # [B, units, rows of a unit]
    in_order = unmet.transpose(1, 2).flatten(1)
    chosen = largest(in_order, torch.tensor(totals, device=device), noise, most=max(totals))
    lengths = chosen.view(batch, -1, unmet.shape[1]).sum(dim=1)  # [B, units]
    if per == "head":
        return lengths.view(batch, len(ranked), heads)
    return torch.stack([_of_heads(*each, noise) for each in zip(ranked, lengths.unbind(1), strict=True)], dim=1)


def _by_unit(rows: Tensor, per: str) -> Tensor:
    """`[B, K, T]` as `[B, units, rows of a unit]`; those of a layer token by token."""
    return rows if per == "head" else rows.transpose(1, 2).flatten(1)[:, None]


def _unmet(importance: Tensor, ranked: Tensor) -> Tensor:
    """The share of a unit's importance that the rows before each one leave open, in its order, float32 `[B, units, N]`.

    It is infinite for rows that are kept in any case, and minus infinity where there is no row. Sums begin with the
    least rows, so that small shares are as exact as large ones.
    """
    ordered, order = ranked.sort(dim=-1, descending=True, stable=True)
    weights = importance.double().masked_fill(ranked == float("-inf"), 0.0).gather(-1, order)
    open_from = weights.flip(-1).cumsum(dim=-1).flip(-1)
    share = (open_from / open_from[..., :1].clamp(min=1e-300)).float()
    return share.where(ordered.isfinite(), ordered.to(share.dtype))


def _of_heads(ranked: Tensor, lengths: Tensor, noise: float) -> Tensor:
    """How many of a layer's best rows, `lengths` `[B]` of them, are of each head, int64 `[B, K]`."""
    pooled = ranked.transpose(1, 2).flatten(1)
    chosen = largest(pooled, lengths.to(pooled.device), noise)
    return chosen.unflatten(1, (-1, ranked.shape[1])).sum(dim=1).to(lengths.device)
