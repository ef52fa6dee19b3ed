"""Ranks of scores: correlation, and what two rankings have on top in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headprof.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two score tensors of equal shape, ties ranked by their average; NaN if either is constant."""
    if a.shape != b.shape:
        raise ValueError(f"cannot correlate scores of shapes {list(a.shape)} and {list(b.shape)}")
    return float(rank_correlations(a.flatten(), b.reshape(1, -1)))


def top_overlap(a: Tensor, b: Tensor, k: int) -> float:
    """Share of the `k` best heads of `a` that are also among the `k` best of `b`, 0 to 1 (1 when `k` is 0)."""
    if a.shape != b.shape:
        raise ValueError(f"cannot compare scores of shapes {list(a.shape)} and {list(b.shape)}")
    best = set(top_indices(a, k))
    return len(best.intersection(top_indices(b, k))) / len(best) if best else 1.0


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 over the last dimension, float64; equal values share the mean of the ranks they take together."""
    import torch

    values = values.contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def rank_correlations(a: Tensor, rows: Tensor) -> Tensor:
    """`spearman` of scores `[n]` with each of some rows `[B, n]`, float64 `[B]`."""
    x, y = (ranks - ranks.mean(dim=-1, keepdim=True) for ranks in (average_ranks(a), average_ranks(rows)))
    return (y @ x) / (x.norm() * y.norm(dim=-1))


def rank_rows(values: Tensor) -> Tensor:
    """Ranks from 0 over the last dimension, float32; of equal values the first has the lower."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1).float()


def top_indices(scores: Tensor, k: int) -> list[int]:
    """Flat indices of the `k` largest scores, best first; equal scores by index."""
    if k < 0:
        raise UsageError(f"{k} top heads cannot be listed: give 0 or more.")
    return scores.flatten().argsort(descending=True, stable=True)[:k].tolist()
