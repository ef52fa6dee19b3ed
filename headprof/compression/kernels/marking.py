"""The largest of each row of numbers marked by Triton, in one launch after the top ones are known."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.compression.kernels.triton_support import triton_unsupported

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 2048


def serves(values: Tensor) -> bool:
    """Whether the kernel takes these numbers."""
    return values.is_cuda and values.dtype == torch.float32 and triton_unsupported(values[..., :1]) is None


@torch.no_grad()
def mark_largest(values: Tensor, top: Tensor, counts: Tensor, noise: float) -> Tensor:
    """What `reduction.largest` marks.

    Args:
        values: float32 `[..., T]`.
        top: the largest of each row in descending order, `[..., most]`.
        counts: how many to mark of each, int64 `[...]`, at most `most`.
        noise: the largest difference that means nothing, as a share of the values.

    Returns:
        bool `[..., T]`.
    """
    kernel = _kernel()
    values, top, counts = values.contiguous(), top.contiguous(), counts.contiguous()
    marks = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    size, most = values.shape[-1], top.shape[-1]
    with torch.cuda.device_of(values):
        kernel[(values.numel() // size,)](
            values, top, counts, marks.view(torch.uint8), noise, size, most, BLOCK=_BLOCK, num_warps=8
        )
    return marks


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """The kernel, for Triton to compile at its first launch; Triton itself is imported no earlier than here."""
    global tl
    tl = import_module("triton.language")
    return import_module("triton").jit(_mark_kernel)


def _mark_kernel(
    values,  # [rows, size]
    top,  # [rows, most]
    counts,  # [rows]
    marks,  # [rows, size], written
    noise,
    size,
    most,
    BLOCK: tl.constexpr,
):
    """One row: how many are above the last that may stay, then of those like it the earliest that fill the rest."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row).to(tl.int32)
    least = tl.load(top + row * most + tl.maximum(count - 1, 0))
    low = tl.minimum(least * (1.0 - noise), least * (1.0 + noise))
    high = tl.maximum(least * (1.0 - noise), least * (1.0 + noise))
    above_all = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        part = tl.load(values + row * size + index, mask=index < size, other=float("-inf"))
        above_all += (part > high).to(tl.int32)
    room = count - tl.sum(above_all, 0)
    before = 0
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < size
        part = tl.load(values + row * size + index, mask=inside, other=float("-inf"))
        above = part > high
        equal = (part >= low) & (part <= high) & inside
        number = before + tl.cumsum(equal.to(tl.int32), 0)
        tl.store(marks + row * size + index, (above | (equal & (number <= room))).to(tl.uint8), mask=inside)
        before += tl.sum(equal.to(tl.int32), 0)
