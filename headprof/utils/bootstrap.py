"""How sure a head's score is, and how sure the ranking: probes that share a context are drawn together, or not at all.

Shapes: `n` probes, `C` clusters (contexts), `M` heads, `B` resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

RESAMPLES = 2000
_LEVEL = 0.95
_BLOCK = 1024
"""Heads whose resampled means are held at once."""


def cluster_sums(values: torch.Tensor, clusters: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and number of the values of each cluster.

    Args:
        values: `[n, M]`.
        clusters: which cluster each belongs to, any integers, `n` of them.

    Returns:
        float64 `[C, M]` and float64 `[C]`, in ascending order of the clusters.
    """
    _, cluster_of = torch.tensor(clusters).unique(return_inverse=True)  # [n], from 0
    counts = cluster_of.bincount().double()
    sums = torch.zeros(len(counts), values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, cluster_of, values.double()), counts


def standard_error(values: torch.Tensor, clusters: Sequence[int]) -> torch.Tensor:
    """Standard error of the mean of clustered values, `[M]`; zero for a single cluster.

    The linearized variance of a ratio of cluster totals (Cochran 1977, section 2.11), which for clusters of one is the
    textbook `s / sqrt(n)`.
    """
    sums, counts = cluster_sums(values, clusters)
    deviations = sums - counts[:, None] * (sums.sum(dim=0) / counts.sum())
    correction = len(counts) / max(1, len(counts) - 1)
    return (correction * deviations.square().sum(dim=0)).sqrt().div(counts.sum()).float()


def resampled_weights(num_clusters: int, seed: int, resamples: int = RESAMPLES) -> torch.Tensor:
    """How often each cluster is drawn in each bootstrap resample, float64 `[B, C]`; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_clusters, (resamples, num_clusters), generator=generator)
    weights = torch.zeros(resamples, num_clusters, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


def bootstrap_interval(
    values: torch.Tensor, clusters: Sequence[int], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of the 95 % percentile bootstrap interval of each head's mean (Efron and Tibshirani 1993, chapter 13).

    Whole clusters are resampled.

    Args:
        values: `[n, M]`.
        clusters: cluster of each of the `n`.
        seed: of the resamples.
        resamples: `B`.

    Returns:
        float32 `[M]` each.
    """
    sums, counts = cluster_sums(values, clusters)
    weights = resampled_weights(len(counts), seed, resamples)
    tails = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    ends = [_means(block, counts, weights).quantile(tails, dim=0) for block in sums.split(_BLOCK, dim=1)]
    low, high = torch.cat(ends, dim=1).float()
    return low, high


def expected_change(
    values: torch.Tensor, clusters: Sequence[int], top: int, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Share of the `top` heads that other probes of the same kind would be expected to replace, 0 to 1.

    The mean, over bootstrap resamples of the clusters, of the share of the best `top` heads that are not among the
    resample's own best. Equal scores rank in the order of the heads.
    """
    sums, counts = cluster_sums(values, clusters)
    weights = resampled_weights(len(counts), seed, resamples)
    best = _best(sums.sum(dim=0)[None], top)
    kept = torch.zeros(sums.shape[1], dtype=torch.bool)
    kept[best[0]] = True
    shares = [kept[_best(_means(sums, counts, block), top)].double().mean(dim=1) for block in weights.split(64)]
    return 1 - float(torch.cat(shares).mean())


def _means(sums: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean of each resample, `[B, M]`."""
    return (weights @ sums) / (weights @ counts)[:, None]


def _best(means: torch.Tensor, top: int) -> torch.Tensor:
    return means.argsort(dim=1, descending=True, stable=True)[:, :top]
