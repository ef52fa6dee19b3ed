"""The directions in which most of some rows lie."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from headprof.compression.kernels import looking

_ROUNDS = 12
_FLOOR = 1e-6
"""Of the sum of all eigenvalues, what is added to each so that none of them is lost to rounding."""


def grams(rows: Tensor, before: Tensor, most: int, batch: int, heads: int) -> Tensor:
    """Products `x^T x`, summed over the rows of heads that follow one another, float64 `[B * groups, D, D]`.

    Where two directions are about as large, the last bit of a sum decides which of them counts; in float64 it is the
    same bit in a batch as alone.

    Args:
        rows: float `[P, D]`, head by head.
        before: rows of all heads before each, then of all, int32 `[N + 1]`.
        most: no head has more of them.
        batch: `B` sequences, whose heads are not summed together.
        heads: how many of a sequence's heads are summed together; the last may be fewer.
    """
    index = before[:-1, None].long() + torch.arange(most, device=rows.device)
    padded = rows[index.clamp(max=len(rows) - 1)].double() * (index < before[1:, None])[..., None]  # [N, most, D]
    return of_groups(padded.transpose(1, 2) @ padded, batch, heads)


def of_groups(each: Tensor, batch: int, heads: int) -> Tensor:
    """What each of all heads has, `[N, ...]`, summed over those that follow one another, `[B * groups, ...]`.

    Args:
        each: of each head.
        batch, heads: as for `grams`.
    """
    parts = each.unflatten(0, (batch, -1)).split(heads, dim=1)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1).flatten(0, 1)


def leading_directions(grams: Tensor, rank: int) -> Tensor:
    """Orthonormal directions in which most of some rows lie, the most first: float32 `[M, rank, D]`.

    They are the leading eigenvectors of `x^T x`, the right singular vectors of `x`. `eigh` makes the host wait for a
    CUDA device, to see whether all went well; there so many rounds of orthogonal iteration stand for it (Golub and Van
    Loan, "Matrix Computations", 8.2.4), after which what is left of the rows is all but the least there can be.

    Args:
        grams: `x^T x`, `[M, D, D]`.
        rank: how many directions, at most `D`.
    """
    return (by_eigenvectors if looking.is_free(grams.device) else by_iteration)(grams, rank)


def by_eigenvectors(grams: Tensor, rank: int) -> Tensor:
    """`leading_directions`, for which the host waits."""
    vectors = torch.linalg.eigh(grams.double()).eigenvectors  # in columns, ascending
    return vectors.flip(-1)[..., :rank].transpose(1, 2).float()


def by_iteration(grams: Tensor, rank: int) -> Tensor:
    """`leading_directions`, for which nobody waits."""
    size, exact = grams.shape[1], grams.double()
    sums = exact.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
    scaled = exact / sums
    scaled.diagonal(dim1=1, dim2=2).add_(_FLOOR)
    directions = _start(size, rank, grams.device).expand(len(grams), -1, -1)
    for _ in range(_ROUNDS):
        directions = _orthonormal(scaled @ directions)
    return directions.transpose(1, 2).float()


def _orthonormal(columns: Tensor) -> Tensor:
    """What spans the same, `[M, D, rank]`: by Cholesky's factor of the Gram matrix, and again for what that leaves."""
    for _ in range(2):
        factor = torch.linalg.cholesky_ex(columns.transpose(1, 2) @ columns, check_errors=False).L
        columns = torch.linalg.solve_triangular(factor, columns.transpose(1, 2), upper=False).transpose(1, 2)
    return columns


@lru_cache(maxsize=64)
def _start(size: int, rank: int, device: torch.device) -> Tensor:
    """Columns that are no multiples of one another, the same every time, float64 `[size, rank]`."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(mode=False):
        numbers = torch.randn(size, rank, dtype=torch.float64, generator=generator)
        return torch.linalg.qr(numbers).Q.to(device, non_blocking=True)
