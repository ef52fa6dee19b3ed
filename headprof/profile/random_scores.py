"""Head profiles of models with random weights."""

from __future__ import annotations

import torch

from headprof.models.shape import HeadShape
from headprof.profile.head_profile import KINDS, HeadProfile


def random_profile(shape: HeadShape, seed: int = 0) -> HeadProfile:
    """A head profile of no model in particular: few heads with high scores, as real ones have, but any heads."""
    generator = torch.Generator().manual_seed(seed)
    draw = {which: torch.rand(shape.num_layers, shape.num_heads, generator=generator) for which in KINDS}
    return HeadProfile("random", shape, {which: scores**4 for which, scores in draw.items()})
