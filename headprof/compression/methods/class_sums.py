"""Sums of rows by class, in an order that is the same every time, on a GPU too."""

from __future__ import annotations

from torch import Tensor, arange


def add_by_class(total: Tensor, classes: Tensor, values: Tensor) -> Tensor:
    """Add each row to the sum of its class, in place.

    CUDA's `scatter_add_` and `index_add_` add in whatever order their threads come, so that sums of the same numbers
    differ in their last bits from run to run, and with them now and then a token. `index_put_` sorts by class first.

    Args:
        total: what the sums begin with, float `[N, C, D]`, contiguous; they are left in it.
        classes: of each row of `N` sets, int64 `[N, M]`, below `C`.
        values: rows `[N, M, D]` of the same dtype.

    Returns:
        `total`.
    """
    sets, number, width = total.shape
    if not total.is_cuda:
        return total.scatter_add_(1, classes[..., None].expand_as(values), values)
    index = classes + number * arange(sets, device=classes.device)[:, None]
    total.view(-1, width).index_put_((index.flatten(),), values.reshape(-1, width), accumulate=True)
    return total
