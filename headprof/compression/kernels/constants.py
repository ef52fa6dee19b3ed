"""Small tensors that depend on nothing but sizes: made once for a device, so that no layer waits for their upload."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def constant(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """These numbers, `[len(numbers)]`; whoever gets it must not write to it."""
    with torch.inference_mode(mode=False):
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def numbers_to(last: int, device: torch.device) -> Tensor:
    """1, 2, ... `last`, int64."""
    with torch.inference_mode(mode=False):
        return torch.arange(1, last + 1, device=device)


@lru_cache(maxsize=64)
def newer_queries(count: int, device: torch.device) -> Tensor:
    """Of the last `count` tokens, which ones each of them cannot see, bool `[count, count]`, a row for each query."""
    with torch.inference_mode(mode=False):
        return torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
