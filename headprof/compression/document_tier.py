"""The second tier of a compressed document: how its file has it, and what that must be before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from headprof.compression.cache.second_tier import Clusters, HostRows, SecondTier
from headprof.compression.methods.recall import Recall
from headprof.models.shape import HeadShape
from headprof.utils.tensor_files import Stored

TIER_ROWS = ("tier_keys", "tier_values", "tier_positions")
"""A layer's evicted rows, by their names: head after head, cluster after cluster. They stay in the file."""
TIER_PARTS = ("recalled", "tier_centroids", "tier_sizes", *TIER_ROWS)
"""These, how many of them each head may bring back, and what stands for the clusters."""


def tier_parts(tier: SecondTier, batch: int) -> dict[str, Tensor]:
    """The tensors of a tier of all heads of a layer, by their names in the file."""
    rows, clusters = tier.in_order(), tier.clusters
    return {
        "recalled": torch.tensor(tier.slots, dtype=torch.int32).view(batch, -1),
        "tier_centroids": clusters.centroids.unflatten(0, (batch, -1)),
        "tier_sizes": clusters.sizes.int().unflatten(0, (batch, -1)),
        **dict(zip(TIER_ROWS, rows.tensors, strict=True)),
    }


def saved_tier(parts: Mapping[str, Tensor], recall: Recall, window: int | None) -> SecondTier:
    """A layer's tier from its tensors; of these the rows are used where they are.

    Args:
        parts: as `tier_parts` has them.
        recall: how rows are brought back.
        window: tokens that the layer's queries see, or `None`.
    """
    sizes = parts["tier_sizes"].flatten(0, 1).long()
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view(sizes.shape)
    clusters = Clusters(parts["tier_centroids"].flatten(0, 1), starts, sizes)
    rows = HostRows(*(parts[name] for name in TIER_ROWS))
    return SecondTier(recall, clusters, (rows,), parts["recalled"].flatten().tolist(), window)


def check_tier_sizes(prefix: str, own: Mapping[str, Stored], recalls: bool, shape: HeadShape, batch: int) -> None:
    """Types and sizes of one layer's tensors.

    Args:
        prefix: what their names begin with.
        own: those that there are.
        recalls: whether the document's method brings back rows.
        shape: of the model.
        batch: sequences.

    Raises:
        ValueError: one is missing, too many, or not of the size that the others call for.
    """
    found = [part for part in TIER_PARTS if part in own]
    if not recalls:
        if found:
            raise ValueError(f"it holds {prefix}{found[0]}, which its method brings nothing back from")
        return
    if missing := [part for part in TIER_PARTS if part not in own]:
        raise ValueError(f"it lacks the tensor {prefix}{missing[0]}")
    rows, heads = own["tier_positions"].shape[:1], (batch, shape.num_kv_heads)
    clusters, dtype = own["tier_sizes"].shape[2:3], own["keys"].dtype
    wanted = {
        "recalled": Stored("I32", heads),
        "tier_sizes": Stored("I32", (*heads, *clusters)),
        "tier_centroids": Stored(dtype, (*heads, *clusters, shape.head_dim)),
        "tier_keys": Stored(dtype, (*rows, shape.head_dim)),
        "tier_values": Stored(dtype, (*rows, shape.head_dim)),
        "tier_positions": Stored("I32", rows),
    }
    for part, stored in wanted.items():
        if own[part] != stored or 0 in clusters:
            raise ValueError(
                f"its {prefix}{part} are {own[part].dtype} {list(own[part].shape)} where {list(stored.shape)} of "
                f"{stored.dtype} belong"
            )


def check_tier_counts(prefix: str, recalled: Tensor, sizes: Tensor, rows: int, seen: int) -> None:
    """How many rows clusters have, int32 `[B, K, C]`, and how many each head may bring back, int32 `[B, K]`.

    Raises:
        ValueError: these are not the rows there are.
    """
    counts = sizes.long().sum(dim=-1)
    if int(sizes.min()) < 0 or int(counts.max()) > seen or int(counts.sum()) != rows:
        raise ValueError(f"its {prefix}tier_sizes are not those of the {rows} rows there are")
    if int(recalled.min()) < 0 or bool((recalled.long() > counts).any()):
        raise ValueError(f"its {prefix}recalled are more than the rows there are")


def bytes_that_stay(stored: Mapping[str, Stored]) -> int:
    """Bytes of a file's tensors that are not read into memory but stay where they are."""
    sizes = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    rows = [each for name, each in stored.items() if name.rpartition(".")[2] in TIER_ROWS]
    return sum(math.prod(each.shape) * sizes.get(each.dtype, 0) for each in rows)
