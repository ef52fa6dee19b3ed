"""Rows of alike keys, put together: k-means by cosine, of many heads at once.

Shapes: `N` heads, `T` rows of each, `C` clusters, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

_BLOCK = 2**24
"""Similarities that are computed at a time, so that memory does not grow with rows times clusters."""


@dataclass(frozen=True)
class Clustering:
    """Which cluster each row belongs to.

    Attributes:
        labels: int64 `[N, T]`, below `C`; of a row that is not to be clustered, `C`.
        centroids: mean key of each cluster, float32 `[N, C, D]`; zeros where there are no rows.
        sizes: rows of each cluster, int64 `[N, C]`; 0 where a head has no more clusters.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor


def cluster_keys(keys: Tensor, rows: Tensor, rows_per_cluster: int, iterations: int, seed: int) -> Clustering:
    """K-means over the keys of each head, by cosine: a row joins the centroid that its key points along best.

    A head has one cluster for `rows_per_cluster` rows, the last one not full. The first centroids are as many of its
    rows, drawn at random; later ones are the means of their rows (ClusterKV, arXiv 2412.03213, section 3). A centroid
    that no row joins stays where it is.

    Args:
        keys: `[N, T, D]`.
        rows: which are to be clustered, bool `[N, T]`.
        rows_per_cluster: at least 1.
        iterations: how often centroids are moved, at least 1.
        seed: of the draw.
    """
    keys, counts = keys.float(), rows.sum(dim=-1)
    wanted = -(-counts // rows_per_cluster)  # [N]
    centroids, used = _drawn(keys, rows, wanted, seed)
    for _ in range(iterations):
        labels = _nearest(keys, centroids, used).masked_fill(~rows, used.shape[1])
        sums, sizes = _sums(keys, labels, used.shape[1])
        centroids = torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], centroids)
    labels = _nearest(keys, centroids, used).masked_fill(~rows, used.shape[1])
    sums, sizes = _sums(keys, labels, used.shape[1])
    return Clustering(labels, sums / sizes.clamp(min=1)[..., None], sizes)


def _drawn(keys: Tensor, rows: Tensor, wanted: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The first centroids of each head, `[N, C, D]`, and which of them it has, bool `[N, C]`.

    A number is drawn for a head's first row, for its second, and so on, so that padding between them changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows.shape[1], generator=generator).to(keys.device)[rows.long().cumsum(dim=-1) - 1]
    most = max(1, int(wanted.max()))
    chosen = order.masked_fill(~rows, -1.0).topk(min(most, rows.shape[1]), dim=-1).indices
    used = torch.arange(chosen.shape[1], device=keys.device) < wanted[:, None]
    return keys.gather(1, chosen[..., None].expand(-1, -1, keys.shape[-1])), used


def _nearest(keys: Tensor, centroids: Tensor, used: Tensor) -> Tensor:
    """The centroid of those in use with the largest cosine to each key, int64 `[N, T]`."""
    directions = normalize(centroids, dim=-1).transpose(1, 2)
    block = max(1, _BLOCK // max(1, used.numel()))
    found = [
        (part @ directions).masked_fill(~used[:, None], float("-inf")).argmax(dim=-1)
        for part in keys.split(block, dim=1)
    ]
    return torch.cat(found, dim=1)


def _sums(keys: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The sum of each cluster's keys, `[N, C, D]`, and how many they are, int64 `[N, C]`; label `C` is none."""
    heads, _, head_dim = keys.shape
    flat = (labels + torch.arange(heads, device=keys.device)[:, None] * (clusters + 1)).flatten()
    sums = keys.new_zeros(heads * (clusters + 1), head_dim).index_add_(0, flat, keys.flatten(0, 1))
    sizes = torch.bincount(flat, minlength=heads * (clusters + 1)).view(heads, clusters + 1)
    return sums.view(heads, clusters + 1, head_dim)[:, :-1], sizes[:, :-1]
