"""Rows that each KV head keeps of a prompt whose question is known, at some budgets: part of a head profile.

They are float32 `[S, L, K]`, for `S` budgets in ascending order; each budget is the mean over the heads. A file names
them `REFINED_ROWS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headprof.profile.faults import LARGEST_SCORE

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

REFINED_ROWS = "refined"
MOST_BUDGETS = 64


def refined_rows_fault(rows: Tensor, shape: HeadShape) -> str | None:
    """What is wrong with such numbers, as the end of a sentence; `None` when nothing is."""
    import torch

    grid = (shape.num_layers, shape.num_kv_heads)
    if rows.dtype != torch.float32:
        return f"are {str(rows.dtype).removeprefix('torch.')}, not float32"
    if rows.ndim != 3 or tuple(rows.shape[1:]) != grid or not 1 <= len(rows) <= MOST_BUDGETS:
        return f"have shape {list(rows.shape)} where up to {MOST_BUDGETS} of {list(grid)} belong"
    if not ((rows >= 0) & (rows <= LARGEST_SCORE)).all():
        return "are not all numbers of rows"
    budgets = rows.double().mean(dim=(1, 2))
    if not (budgets > 0).all() or not (budgets.diff() > 0).all():
        return "are of the same budget twice, or of none"
    return None
