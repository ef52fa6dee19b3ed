"""Sums of rows by class, in an order that is the same every time, on a GPU too."""

from __future__ import annotations

import torch
from torch import Tensor

_MEMBERSHIPS = 1 << 25
"""Most pairs of a class and a row held at once."""


def add_by_class(total: Tensor, classes: Tensor, values: Tensor, *, crowded: bool = False) -> Tensor:
    """Add each row to the sum of its class, in place.

    CUDA's `scatter_add_` and `index_add_` add in whatever order their threads come, so that sums of the same numbers
    differ in their last bits from run to run, and with them now and then a token. `index_put_` sorts by class first,
    and adds the rows of a class one after the other.

    Args:
        total: what the sums begin with, float `[N, C, D]`, contiguous; they are left in it.
        classes: of each row of `N` sets, int64 `[N, M]`, below `C`.
        values: rows `[N, M, D]` of the same dtype.
        crowded: whether one class may have most of the rows, so that on CUDA sums are better taken by a product.

    Returns:
        `total`.
    """
    sets, number, width = total.shape
    if not total.is_cuda:
        return total.scatter_add_(1, classes[..., None].expand_as(values), values)
    if crowded:
        return _by_products(total, classes, values)
    index = classes + number * torch.arange(sets, device=classes.device)[:, None]
    total.view(-1, width).index_put_((index.flatten(),), values.reshape(-1, width), accumulate=True)
    return total


def _by_products(total: Tensor, classes: Tensor, values: Tensor) -> Tensor:
    """The same by products with the matrix that says which row is of which class."""
    sets, number, _ = total.shape
    among = torch.arange(number, device=total.device)[:, None]
    step = max(1, _MEMBERSHIPS // max(1, sets * number))
    for part, rows in zip(classes.split(step, dim=1), values.split(step, dim=1), strict=True):
        total.baddbmm_((part[:, None] == among).to(total.dtype), rows)
    return total
