"""What the packed rows in a document on disk must be before they are used (see `document_checks`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headprof.compression.kernels.packed_kinds import ALL_PARTS, is_kind, part_names
from headprof.models.shape import HeadShape
from headprof.utils.records import is_whole, parse_json
from headprof.utils.tensor_files import Stored

PACKED_PARTS = ("packed", *ALL_PARTS)
"""A layer's tensors, by their names: how many rows of each head, and what holds them."""

_FACTS = {"first": (0, 2**31 - 1), "bits": (2, 8), "group_size": (1, 2**31 - 1), "bases": (1, 2**31 - 1)}
"""What is said of each layer that has such rows, between which whole numbers."""


def packed_facts(metadata: Mapping[str, str], num_layers: int) -> list[dict[str, int] | None]:
    """How each layer's packed rows are held; `None` for one that has none.

    Raises:
        ValueError: what is said of them cannot be.
    """
    values = parse_json(metadata.get("packed", "null"))
    if values is None:
        return [None] * num_layers
    if not isinstance(values, list) or len(values) != num_layers or not all(map(_is_known, values)):
        raise ValueError("what it says of rows that are not held in full cannot be")
    return values


def _is_known(facts: Any) -> bool:
    if facts is None:
        return True
    if not isinstance(facts, dict) or not is_kind(facts):
        return False
    return all(is_whole(value, *_FACTS[name]) for name, value in facts.items()) and facts.get("bits", 4) in (2, 4, 8)


def check_packed_sizes(
    prefix: str, own: Mapping[str, Stored], facts: Mapping[str, int] | None, shape: HeadShape, batch: int
) -> None:
    """Types and sizes of one layer's tensors.

    Raises:
        ValueError: one is missing, too many, or not of the size that the others call for.
    """
    found = [part for part in PACKED_PARTS if part in own]
    if facts is None:
        if found:
            raise ValueError(f"it does not say how its {prefix}{found[0]} are held")
        return
    needed = ("packed", *part_names(facts))
    if missing := [part for part in needed if part not in own]:
        raise ValueError(f"it lacks the tensor {prefix}{missing[0]}")
    if more := [part for part in found if part not in needed]:
        raise ValueError(f"it does not say how its {prefix}{more[0]} are held")
    wanted = _wanted_sizes(own, facts, shape, batch)
    for part, stored in {"packed": Stored("I32", (batch, shape.num_kv_heads)), **wanted}.items():
        if own[part] != stored:
            raise ValueError(
                f"its {prefix}{part} are {own[part].dtype} {list(own[part].shape)} where {list(stored.shape)} of "
                f"{stored.dtype} belong"
            )


def _wanted_sizes(
    own: Mapping[str, Stored], facts: Mapping[str, int], shape: HeadShape, batch: int
) -> dict[str, Stored]:
    if "bases" in facts:
        kind = _latent_sizes(own, facts, shape) if "bits" in facts else _low_rank_sizes(own, facts["bases"], shape)
        return {**kind, **_bases_sizes(own, shape, batch)}
    return _quantised_sizes(own, facts["bits"], shape) if "bits" in facts else _thinned_sizes(own, shape, batch)


def _quantised_sizes(own: Mapping[str, Stored], bits: int, shape: HeadShape) -> dict[str, Stored]:
    packed = own["positions"].shape[0] - own["keys"].shape[0]
    codes = Stored("U8", (packed, shape.head_dim * bits // 8))
    return {
        "key_codes": codes,
        "value_codes": codes,
        "key_scales": Stored("F16", (*own["key_scales"].shape[:1], 2, shape.head_dim)),
        "value_scales": Stored("F16", (packed, 2)),
    }


def _thinned_sizes(own: Mapping[str, Stored], shape: HeadShape, batch: int) -> dict[str, Stored]:
    packed = own["positions"].shape[0] - own["keys"].shape[0]
    channels = tuple(min(count, shape.head_dim) for count in own["thin_keys"].shape[1:2])
    return {
        "thin_keys": Stored(own["keys"].dtype, (packed, *channels)),
        "thin_values": Stored(own["keys"].dtype, (packed, shape.head_dim)),
        "key_channels": Stored("I16", (batch * shape.num_kv_heads, *channels)),
    }


def _low_rank_sizes(own: Mapping[str, Stored], bases: int, shape: HeadShape) -> dict[str, Stored]:
    packed, dtype = own["positions"].shape[0] - own["keys"].shape[0], own["keys"].dtype
    ranks = {part: tuple(min(rank, shape.head_dim) for rank in own[f"low_{part}s"].shape[1:2]) for part in _BOTH}
    return {
        **{f"low_{part}s": Stored(dtype, (packed, *ranks[part])) for part in _BOTH},
        **{f"{part}_basis": Stored(dtype, (bases, *ranks[part], shape.head_dim)) for part in _BOTH},
    }


_BOTH = ("key", "value")


def _latent_sizes(own: Mapping[str, Stored], facts: Mapping[str, int], shape: HeadShape) -> dict[str, Stored]:
    packed, ranks = own["positions"].shape[0] - own["keys"].shape[0], own["latent_basis"].shape[1:2]
    rank = min([*ranks, 2 * shape.head_dim])
    if rank * facts["bits"] % 8:
        raise ValueError("its latents fill no whole bytes")
    return {
        "latent_codes": Stored("U8", (packed, rank * facts["bits"] // 8)),
        "latent_scales": Stored("F16", (*own["latent_scales"].shape[:1], 2, rank)),
        "latent_basis": Stored(own["keys"].dtype, (facts["bases"], rank, 2 * shape.head_dim)),
    }


def _bases_sizes(own: Mapping[str, Stored], shape: HeadShape, batch: int) -> dict[str, Stored]:
    """Of what says which basis each head has, and how keys are turned."""
    turned = (shape.head_dim,) if own["key_frequencies"].shape != (0,) else (0,)
    return {
        "basis_of_head": Stored("I32", (batch * shape.num_kv_heads,)),
        "key_frequencies": Stored("F32", turned),
        "key_partners": Stored("I16", turned),
    }


def check_packed_counts(
    prefix: str, own: Mapping[str, Stored], facts: Mapping[str, int], counts: torch.Tensor, lengths: torch.Tensor
) -> None:
    """How many rows of each head are packed, of those that it has; both int32 `[B, K]`.

    Raises:
        ValueError: these are not so many as there are of them.
    """
    counts, lengths = counts.long(), lengths.long()
    room = (lengths - facts["first"]).clamp(min=0)
    right = int(counts.min()) >= 0 and bool((counts <= room).all())
    if "bits" in facts:
        groups = int((-(-counts // facts["group_size"])).sum())
        scales = own["latent_scales" if "bases" in facts else "key_scales"]
        right = right and groups == scales.shape[0]
    if not right or int(counts.sum()) != own[part_names(facts)[0]].shape[0]:
        raise ValueError(f"its {prefix}packed are not those of the rows there are")


def check_packed_numbers(
    prefix: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, int], head_dim: int
) -> None:
    """That channels, partners and bases are some of those there are.

    Raises:
        ValueError: one of them is not.
    """
    ends = {"key_channels": head_dim, "key_partners": head_dim, "basis_of_head": facts.get("bases", 0)}
    for part, end in ends.items():
        numbers = tensors.get(prefix + part)
        if numbers is not None and numbers.numel() and not ((numbers >= 0) & (numbers < end)).all():
            raise ValueError(f"its {prefix}{part} hold what cannot be")
