"""What is evicted may be kept elsewhere and brought back: how, and which rows of it a query calls for.

Shapes: `N` heads, `g` query heads in a group, `C` clusters of a head, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.errors import UsageError


@dataclass(frozen=True)
class Recall:
    """Whether evicted rows are kept in a second tier, in clusters of alike keys, and how they are brought back.

    After ClusterKV (Liu et al., arXiv 2412.03213). A head's budget is of rows that attention reads: some of them stay,
    and the others are those that the newest query calls for.

    Attributes:
        cluster: evicted rows for which there is one cluster; 0 to keep no second tier.
        recall_share: share of a head's rows, beside those that it keeps in any case, that are brought back; the others
            stay, chosen by the method's importance. 1 in the paper.
        recall_every: tokens after which rows are chosen anew.
        recall_among: rows that are looked at one by one, those of the nearest clusters, as a multiple of the rows that
            are brought back; 1 to take the nearest clusters as they are, as the paper does.
        cluster_iterations: of k-means.
        cluster_seed: of its first centroids.
    """

    cluster: int = 0
    recall_share: float = 1.0
    recall_every: int = 1
    recall_among: int = 1
    cluster_iterations: int = 5
    cluster_seed: int = 0

    def __post_init__(self) -> None:
        least = {"cluster": 0, "recall_every": 1, "recall_among": 1, "cluster_iterations": 1, "cluster_seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"A {name} of {getattr(self, name)} cannot be: give at least {value}.")
        if not 0 <= self.recall_share <= 1:
            raise UsageError(f"A recall_share of {self.recall_share} is no share of a head's rows: give 0 to 1.")

    @property
    def is_on(self) -> bool:
        """Whether there is a second tier."""
        return self.cluster > 0

    def staying(self, counts: Tensor, always_kept: Tensor) -> Tensor:
        """How many of the rows that each head may read stay with it, int64; the rest of them are brought back.

        Args:
            counts: rows that attention may read, int64.
            always_kept: rows that stay in any case, int64 of the same shape.
        """
        spare = (counts - always_kept).clamp(min=0)
        return always_kept.minimum(counts) + spare - (spare.double() * self.recall_share).long()


def attention_shares(queries: Tensor, keys: Tensor, there: Tensor, scaling: float) -> Tensor:
    """The largest share of its attention that any query of a group would pay each key, were there no others.

    Within one query head that is the order of the inner products; between those of a group it makes them comparable.

    Args:
        queries: `[N, g, D]`.
        keys: `[N, C, D]`.
        there: which keys there are, bool `[N, C]`.
        scaling: factor on the logits.

    Returns:
        Logarithms, float32 `[N, C]`; minus infinity where there is no key.
    """
    logits = (queries.float() * scaling) @ keys.float().transpose(1, 2)
    logits = logits.masked_fill(~there[:, None], -torch.finfo(logits.dtype).max)
    return logits.log_softmax(dim=-1).amax(dim=1).masked_fill(~there, float("-inf"))


def rows_of_nearest(scores: Tensor, starts: Tensor, sizes: Tensor, most: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of the clusters with the highest scores, best cluster first, as many as fit; the last one is cut short.

    Args:
        scores: of clusters, `[N, C]`.
        starts, sizes: each cluster's first row and how many rows it has, int64 `[N, C]`.
        most: rows that each head may take, int64 `[N]`.
        width: none may take more.

    Returns:
        Numbers of rows, int64 `[N, width]`, and which of these there are, bool `[N, width]`: the first ones of a head.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    sizes = sizes.gather(1, order)
    ends = sizes.cumsum(dim=-1)
    places = torch.arange(width, device=scores.device).expand(len(scores), -1).contiguous()
    cluster = torch.searchsorted(ends, places, right=True).clamp(max=scores.shape[1] - 1)
    offsets = places - (ends - sizes).gather(1, cluster)
    rows = starts.gather(1, order).gather(1, cluster) + offsets
    there = places < most.minimum(ends[:, -1])[:, None]
    return rows.where(there, 0), there
