"""Head profiles with made-up scores."""

import json
from dataclasses import replace

import torch

from headprof.models.shape import HeadShape
from headprof.profile.head_profile import HeadProfile
from headprof.profile.influence import SITUATIONS, InfluenceCurves
from headprof.profile.kinds import PROBE_KINDS
from headprof.profile.random_scores import random_surrogate as drawn_surrogate
from headprof.profile.tuned import Tuned
from support.tiny_models import tiny_tokenizer

SIZES = [(30, 9, 3), (32, 32, 8), (80, 64, 8), (12, 12, 12), (4, 4, 1), (1, 1, 1)]
"""Layers, heads and KV heads of profiles to draw: common, large, without groups, with one KV head, smallest."""


TUNED = Tuned({"window": 5, "kernel": 3, "shared": True, "temperature": 0.75}, 0.1, 0.2, (16,), 1024, 48, 5)
"""Parameters unlike the usual ones."""
SHAPE = HeadShape("LlamaForCausalLM", 5, 6, 2, 64, 49152)


def random_profile(model, seed=0, kinds=PROBE_KINDS, name="tiny") -> HeadProfile:
    """A profile that fits `model`: most heads near zero, few far above, and for each kind others."""
    shape = HeadShape.from_config(model.config)
    generator = torch.Generator().manual_seed(seed)
    scores = {kind: torch.rand(shape.num_layers, shape.num_heads, generator=generator) ** 4 for kind in kinds}
    curves = {situation: random_curves(shape, seed + number) for number, situation in enumerate(SITUATIONS)}
    return HeadProfile(
        model_name=name,
        shape=shape,
        scores=scores,
        kept_shares=random_shares(shape, seed),
        curves=curves,
        refined_rows=random_rows(shape, seed),
        metadata={"tuned": TUNED.note()},
    )


def random_curves(shape: HeadShape, seed: int = 0, grid=(4, 10, 30, 90)) -> InfluenceCurves:
    """Curves like measured ones: of most heads flat, of a few steep, and rising here and there."""
    generator = torch.Generator().manual_seed(seed)
    steep = torch.rand(shape.num_layers, shape.num_kv_heads, 1, generator=generator) ** 4
    losses = steep / torch.tensor(grid).float().sqrt() + 0.01 * torch.rand(
        *steep.shape[:2], len(grid), generator=generator
    )
    losses = losses - losses[..., -1:]
    return InfluenceCurves(losses, losses.abs() / 10, torch.tensor(grid))


def random_shares(shape: HeadShape, seed: int = 0) -> torch.Tensor:
    """What heads may keep of their tokens at three shares of all, float32 `[3, L, K]`."""
    heads = torch.rand(shape.num_layers, shape.num_kv_heads, generator=torch.Generator().manual_seed(seed)) ** 2 + 0.01
    return torch.stack([(heads * times / heads.max()) for times in (0.1, 0.3, 0.8)])


def random_rows(shape: HeadShape, seed: int = 0, budgets=(20.0, 50.0)) -> torch.Tensor:
    """Rows of heads at some budgets, which heads share unevenly and at each in another way, float32 `[S, L, K]`."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.rand(len(budgets), shape.num_layers, shape.num_kv_heads, generator=generator) ** 3 + 0.01
    return rows * (torch.tensor(budgets)[:, None, None] / rows.mean(dim=(1, 2), keepdim=True))


def small_profile(seed: int = 0, shape: HeadShape = SHAPE, kinds=PROBE_KINDS, **parts) -> HeadProfile:
    """A profile of `shape` with everything that scoring notes, and `parts` in place of its parts."""
    generator = torch.Generator().manual_seed(seed)
    grid = (shape.num_layers, shape.num_heads)
    scores = {kind: torch.rand(grid, generator=generator) for kind in kinds}
    return HeadProfile(
        **{
            "model_name": "org/Small-Model",
            "shape": shape,
            "scores": scores,
            "standard_errors": {kind: torch.rand(grid, generator=generator) for kind in kinds},
            "intervals": {kind: (values * 0.9, values * 1.1) for kind, values in scores.items()},
            "probes_used": dict(zip(kinds, (40, 31), strict=False)),
            "metadata": {"date": "2026-01-02", "accuracy": json.dumps({"boats": [9, 12]})},
        }
        | parts
    )


def make_profile(
    layers: int = 4, heads: int = 6, kv_heads: int = 2, kinds=PROBE_KINDS, name="org/Model"
) -> HeadProfile:
    """A profile to draw, with scores like measured ones: most near zero and a few far above."""
    generator = torch.Generator().manual_seed(layers * heads)
    scores = {kind: torch.rand(layers, heads, generator=generator) ** 12 * 0.6 for kind in kinds}
    return HeadProfile(
        model_name=name,
        shape=HeadShape("M", layers, heads, kv_heads, 64, 100),
        scores=scores,
        standard_errors={kind: table * 0.05 for kind, table in scores.items()},
        probes_used=dict.fromkeys(kinds, 60),
        metadata={"settings": json.dumps({"lengths": [500, 1024, 4096]})},
    )


def with_intervals(profile: HeadProfile) -> HeadProfile:
    """Lopsided intervals, as a bootstrap gives near zero."""
    intervals = {
        kind: (
            (scores - 1.5 * profile.standard_errors[kind]).clamp(min=0),
            scores + 2.5 * profile.standard_errors[kind],
        )
        for kind, scores in profile.scores.items()
    }
    return replace(profile, intervals=intervals)


def random_surrogate(model, seed=0):
    """A surrogate that fits `model` and says something else of each row."""
    return drawn_surrogate(model, HeadShape.from_config(model.config), seed, units=8)


def judging(model, name):
    """What `make_plan` needs beside a profile for a method of this name: a surrogate or a tokenizer."""
    if name.startswith("fastgen"):
        return {"tokenizer": tiny_tokenizer()}
    return {"surrogate": random_surrogate(model)} if "kvzap" in name else {}
