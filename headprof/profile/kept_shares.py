"""What share of its tokens each KV head keeps where the rows of all heads are ranked together: part of a head profile.

It is float32 `[S, L, K]`, for `S` shares that all heads keep together, in ascending order; each of them is the mean
over the heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

MOST_SHARES = 64


def kept_shares_fault(kept: Tensor, shape: HeadShape) -> str | None:
    """What is wrong with such numbers, as the end of a sentence; `None` when nothing is."""
    import torch

    grid = (shape.num_layers, shape.num_kv_heads)
    if kept.dtype != torch.float32:
        return f"are {str(kept.dtype).removeprefix('torch.')}, not float32"
    if kept.ndim != 3 or tuple(kept.shape[1:]) != grid or not 1 <= len(kept) <= MOST_SHARES:
        return f"have shape {list(kept.shape)} where up to {MOST_SHARES} of {list(grid)} belong"
    if not ((kept >= 0) & (kept <= 1)).all():
        return "are not all from 0 to 1"
    if (kept.diff(dim=0) < 0).any():
        return "do not grow with what all heads keep together"
    together = kept.double().mean(dim=(1, 2))
    if not (together > 0).all() or not (together.diff() > 0).all():
        return "are of the same share twice, or of none"
    return None
