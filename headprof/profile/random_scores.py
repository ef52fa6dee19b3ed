"""Head profiles and surrogates of models with random weights."""

from __future__ import annotations

from typing import Any

import torch

from headprof.models.fingerprints import weights_fingerprints
from headprof.models.rotary import rotary_of
from headprof.models.shape import HeadShape
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import KINDS
from headprof.profile.row_features import RowFeatures
from headprof.profile.surrogate import Surrogate
from headprof.profile.tuned import NOTE, Tuned


def random_profile(shape: HeadShape, seed: int = 0) -> HeadProfile:
    """A head profile of no model in particular: few heads with high scores, as real ones have, but any heads."""
    generator = torch.Generator().manual_seed(seed)
    draw = {which: torch.rand(shape.num_layers, shape.num_heads, generator=generator) for which in KINDS}
    usual = Tuned({}, loss=0.0, usual_loss=0.0, budgets=(), length=0, probes=0, seed=seed)
    scores = {which: each**4 for which, each in draw.items()}
    rows = torch.rand(1, shape.num_layers, shape.num_kv_heads, generator=generator) ** 2
    return HeadProfile("random", shape, scores, metadata={NOTE: usual.note()}, refined_rows=64 * rows / rows.mean())


def random_surrogate(model: Any, shape: HeadShape, seed: int = 0, units: int = 64) -> Surrogate:
    """Networks that say something else of each row, from what a fitted surrogate would look at."""
    generator = torch.Generator().manual_seed(seed)
    features = RowFeatures.of_layers([rotary_of(model, layer) for layer in range(shape.num_layers)], shape.head_dim)
    heads, count = (shape.num_layers, shape.num_kv_heads), features.count

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*heads, *sizes, generator=generator)

    parts = {
        "mean": draw(count),
        "scale": draw(count).abs() + 0.5,
        "linear": (draw(count) / count**0.5).half(),
        "hidden": (draw(count, units) / count**0.5).half(),
        "hidden_bias": draw(units).half(),
        "output": (draw(units) / units**0.5).half(),
        "output_bias": draw() - 4,
    }
    dtype = str(model.dtype).removeprefix("torch.")
    return Surrogate("random", shape, weights_fingerprints(model), dtype, features, parts)
