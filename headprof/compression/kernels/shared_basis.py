"""What rows have in common that are held by what they are in a basis, which heads of a layer share.

Shapes as in `packed_rows`; `M` is the number of bases, `R` their rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def times_own(rows: Tensor, matrices: Tensor, before: Tensor, most: int) -> Tensor:
    """Each row times the matrix of its head, in float32, `[P, E]`; the host need not know how many each head has.

    Args:
        rows: `[P, C]`, head by head.
        matrices: of each head, `[N, C, E]`.
        before: rows of all heads before each, then of all, int32 `[N + 1]`.
        most: no head has more of them.
    """
    total, starts = len(rows), before[:-1].long()
    padded = (starts[:, None] + torch.arange(most, device=rows.device)).clamp(max=max(0, total - 1))
    products = rows[padded].float() @ matrices.float()  # [N, most, E]
    shifts = torch.arange(len(starts), device=rows.device) * most - starts
    own = torch.arange(total, device=rows.device)
    own = own + shifts.repeat_interleave(before.diff().long(), output_size=total)
    return products.flatten(0, 1)[own]


def turned(keys: Tensor, positions: Tensor, frequencies: Tensor, partners: Tensor) -> Tensor:
    """Keys turned to these positions, or back by as many that are negative (see `models.rotary.Turning`): float32.

    Args:
        keys: `[P, D]`.
        positions: int `[P]`.
        frequencies: float32 `[D]`; empty where keys are not turned.
        partners: int `[D]`, or empty.
    """
    keys = keys.float()
    if not len(frequencies):
        return keys
    angles = positions[:, None].float() * frequencies
    return keys * angles.cos() - keys[:, partners.long()] * angles.sin()


def bases_of(groups: Sequence[int], counts: Sequence[int], heads: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which bases some heads need, of which there is always one, and where among these each of the heads has its own.

    Args:
        groups: the basis of each of all heads.
        counts: packed rows of each of them; one that has none needs no basis.
        heads: those that are taken.
    """
    needed = list(dict.fromkeys(groups[head] for head in heads if counts[head])) or [0]
    return needed, [needed.index(groups[head]) if counts[head] else 0 for head in heads]
