"""Influence curves: what the right answer loses when one KV head keeps so many rows. Part of a head profile.

A profile holds them for prompts whose question is `known` when rows go, and for documents about which it is `unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headprof.profile.faults import LARGEST_SCORE

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

SITUATIONS = ("known", "unknown")
"""Whether the question is, when rows go."""
MOST_POINTS = 64
LONGEST = 2**24
_PARTS = ("", "_se", "_grid")


@dataclass(frozen=True, eq=False)
class InfluenceCurves:
    """What the right answer loses, by how many rows one KV head keeps of a prompt.

    Attributes:
        losses: rise of the divergence from the full cache, in nats a token of the answer, when the head keeps so many
            rows in place of all; below zero where that brings the answer nearer. Float32 `[L, K, N]`.
        errors: standard errors of these, float32 `[L, K, N]`.
        grid: numbers of rows, int64 `[N]`, ascending; the last is all of a prompt.
    """

    losses: Tensor
    errors: Tensor
    grid: Tensor

    @property
    def points(self) -> list[int]:
        """The numbers of rows."""
        return self.grid.tolist()

    @property
    def area(self) -> Tensor:
        """The mean loss over the grid, a step of it counting alike wherever it lies, float32 `[L, K]`."""
        return self.losses.mean(dim=-1)

    def tensors(self, situation: str) -> dict[str, Tensor]:
        """As a file holds them, by name."""
        parts = (self.losses, self.errors, self.grid)
        return {_name(situation, part): tensor for part, tensor in zip(_PARTS, parts, strict=True)}


def curve_names() -> set[str]:
    """Names of the tensors that a file may hold."""
    return {_name(situation, part) for situation in SITUATIONS for part in _PARTS}


def curves_from(tensors: Mapping[str, Tensor]) -> dict[str, InfluenceCurves]:
    """What a file holds, by situation; raises `ValueError` when a part is missing."""
    found = {}
    for situation in SITUATIONS:
        names = [_name(situation, part) for part in _PARTS]
        held = [tensors[name] for name in names if name in tensors]
        if held and len(held) < len(_PARTS):
            raise ValueError(f"its influence curves for a question that is {situation} lack a part")
        if held:
            found[situation] = InfluenceCurves(*held)
    return found


def curves_fault(curves: InfluenceCurves, shape: HeadShape) -> str | None:
    """What is wrong with such curves, as the end of a sentence; `None` when nothing is."""
    import torch

    points = curves.grid.numel()
    wanted = (shape.num_layers, shape.num_kv_heads, points)
    if curves.grid.dtype != torch.int64 or curves.grid.ndim != 1 or not 1 <= points <= MOST_POINTS:
        return f"are not at 1 to {MOST_POINTS} whole numbers of rows"
    if int(curves.grid[0]) < 1 or int(curves.grid[-1]) > LONGEST or bool((curves.grid.diff() < 1).any()):
        return "are at numbers of rows that do not ascend"
    for part in (curves.losses, curves.errors):
        if part.dtype != torch.float32:
            return f"are {str(part.dtype).removeprefix('torch.')}, not float32"
        if tuple(part.shape) != wanted:
            return f"have shape {list(part.shape)} where {list(wanted)} belongs"
        if not bool((part.abs() <= LARGEST_SCORE).all()):
            return "are not all finite"
    if bool((curves.errors < 0).any()):
        return "have errors below zero"
    return None


def _name(situation: str, part: str) -> str:
    return f"curves_{situation}{part}"
