"""Budgets by influence curves: tokens go where the right answer loses most without them.

Shapes: `L` layers, `K` KV heads per layer, `N` numbers of rows at which losses are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.compression.methods.allocation import to_spend
from headprof.compression.methods.budget import BudgetPolicy
from headprof.compression.methods.solver import falling, refined, solve
from headprof.errors import UsageError
from headprof.profile.influence import LONGEST, SITUATIONS, InfluenceCurves

CURVES = "curves, question "
"""What these budgets need of a profile, made by `headprof score --curves`; the situation follows."""


@dataclass(frozen=True)
class CurveBudget(BudgetPolicy):
    """Heads keep as many tokens as lose the least together, by what each of them loses alone (`solver.solve`).

    A question that is known asks for some facts, which take so many tokens however long the prompt is: curves are read
    at numbers of tokens. A document about which anything may be asked holds the more facts the longer it is: curves are
    read at shares of it.

    Attributes:
        situation: whether the question is known when rows go, one of `headprof.profile.influence.SITUATIONS`.
        minimum: fewest tokens of a head beside those that every head keeps.
    """

    situation: str = "known"
    minimum: int = 2

    def __post_init__(self) -> None:
        if self.situation not in SITUATIONS:
            raise UsageError(f"A question cannot be {self.situation!r}: choose {' or '.join(SITUATIONS)}.")
        if self.minimum < 0:
            raise UsageError("A head cannot keep fewer than 0 tokens: give minimum 0 or more.")

    @property
    def profile_scores(self) -> str:
        return f"{CURVES}{self.situation}"

    @property
    def goes_by_share(self) -> bool:  # type: ignore[override]
        return self.situation == "unknown"

    def allocate(self, scores: Tensor, *, budget: int, context_length: int, always_kept: int) -> Tensor:
        """As `BudgetPolicy.allocate`; `scores` are `[2, N, L, K]`, as `curve_scores` makes them."""
        heads = scores.shape[2:]
        if budget >= context_length:
            return torch.full(heads, context_length, dtype=torch.int64)
        least = always_kept + min(self.minimum, to_spend(budget, always_kept))
        grid = scores[0, :, 0, 0].tolist()
        curves, points = refined(scores[1].movedim(0, -1), [int(point) for point in grid])
        if self.goes_by_share:
            points = [max(1, round(point / grid[-1] * context_length)) for point in points]
            curves, points = _told_apart(curves, points)
        total = budget * heads.numel()
        return solve(curves, points, total, least, context_length)


def curve_scores(curves: InfluenceCurves) -> Tensor:
    """What these budgets go by: numbers of rows, and losses that never rise and end at 0, float32 `[2, N, L, K]`."""
    losses = torch.tensor([falling(each) for each in curves.losses.double().flatten(0, 1).tolist()])
    losses = (losses - losses[:, -1:]).view(curves.losses.shape).movedim(-1, 0)
    grid = curves.grid.double()[:, None, None].expand(losses.shape)
    return torch.stack([grid, losses]).float()


def _told_apart(curves: Tensor, points: list[int]) -> tuple[Tensor, list[int]]:
    """Of several points that have become one, the last."""
    kept = [at for at, point in enumerate(points) if at + 1 == len(points) or points[at + 1] > point]
    return curves[..., kept], [points[at] for at in kept]


def curve_scores_fault(scores: Tensor) -> str | None:
    """What is wrong with what a file says are `curve_scores`, as the end of a sentence; `None` when nothing is."""
    grid, losses = scores.double()
    whole = bool(((grid >= 1) & (grid <= LONGEST)).all()) and torch.equal(grid, grid.round())
    if not whole or not torch.equal(grid, grid[:, :1, :1].expand_as(grid)) or bool((grid.diff(dim=0) < 1).any()):
        return "are at numbers of rows that do not ascend"
    return "rise with the rows that are kept" if bool((losses.diff(dim=0) > 0).any()) else None
