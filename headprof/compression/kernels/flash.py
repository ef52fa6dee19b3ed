"""FlashAttention's kernels for sequences of several lengths, from the flash-attn package or from torch.

A head is a sequence, and so is the free space after it, one without queries: that makes the bounds the cumulative
lengths, and the cache is read where it lies.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from headprof.compression.kernels.ragged_rows import Request
from headprof.compression.kernels.requirements import Package, device_unsupported

FLASH_ATTN = Package("flash_attn", "flash-attn")


def flash_attention(request: Request) -> Tensor:
    """The flash-attn package (FlashAttention-2, Dao 2023)."""
    query, cumulative, max_queries = _packed_queries(request)
    rows = request.rows
    output = import_module("flash_attn").flash_attn_varlen_func(
        query,
        rows.keys[:, None],
        rows.values[:, None],
        cu_seqlens_q=cumulative,
        cu_seqlens_k=rows.bounds,
        max_seqlen_q=max_queries,
        max_seqlen_k=rows.longest,
        softmax_scale=request.scaling,
        causal=request.num_queries > 1,
        softcap=request.softcap or 0.0,
    )
    return _unpacked(request, output)


def varlen_attention(request: Request) -> Tensor:
    """The FlashAttention that comes with torch."""
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    query, cumulative, max_queries = _packed_queries(request)
    rows = request.rows
    # A view, since the flag for grouped queries is younger than the oldest torch that serves here.
    keys, values = (flat[:, None].expand(-1, query.shape[1], -1) for flat in (rows.keys, rows.values))
    causal: dict[str, Any] = {}
    if request.num_queries > 1:
        by_window = "window_size" in inspect.signature(varlen_attn).parameters
        causal = {"window_size": (-1, 0)} if by_window else {"is_causal": True}
    output = varlen_attn(
        query, keys, values, cumulative, rows.bounds, max_queries, rows.longest, scale=request.scaling, **causal
    )
    return _unpacked(request, output)


def _packed_queries(request: Request) -> tuple[Tensor, Tensor, int]:
    """The queries as sequences, head by head; their cumulative numbers, int32 `[2 * N + 1]`; most in one sequence.

    For one new token its group's queries are a sequence, `[N * g, 1, D]`, and see all rows alike; else `[N * Q, g, D]`.
    """
    query = request.by_head().transpose(1, 2)  # [N, g, 1, D] or [N, Q, g, D]
    cumulative = _cumulative_queries(request.num_heads, query.shape[1], query.device)
    return query.flatten(0, 1), cumulative, query.shape[1]


@lru_cache(maxsize=64)
def _cumulative_queries(num_heads: int, queries: int, device: torch.device) -> Tensor:
    """Each head's sequence has `queries` queries, the free space's after it none: `[0, q, q, 2q, 2q, ...]`."""
    with torch.inference_mode(False):
        return (torch.arange(1, 2 * num_heads + 2, device=device) // 2 * queries).int()


def _unpacked(request: Request, output: Tensor) -> Tensor:
    """`[N * g, 1, D]` or `[N * Q, g, D]` as `[B, Q, H, D]`."""
    batch, num_heads, num_queries, head_dim = request.query.shape
    by_head = output.view(batch, request.num_kv_heads, num_queries, request.group_size, head_dim)
    return by_head.transpose(1, 2).reshape(batch, num_queries, num_heads, head_dim)


def _flash_unsupported(request: Request) -> str | None:
    """Common to both that run FlashAttention. It knows rows by their number, but evicted rows leave gaps in it."""
    if reason := device_unsupported(request.query.device):
        return reason
    if request.query.dtype not in (torch.float16, torch.bfloat16):
        return "needs float16 or bfloat16"
    if request.head_dim > 256 or request.head_dim % 8:
        return "needs a head dimension that is a multiple of 8 and at most 256"
    if request.rows.bias is not None:
        return "cannot weigh merged rows or hide padding"
    if request.sinks is not None:
        return "has no attention sinks"
    if request.sliding_window is not None:
        return "has no sliding window over evicted rows"
    if request.rows.packed is not None:
        return "reads only rows that are held in full"
    return None


def varlen_unsupported(request: Request) -> str | None:
    if reason := _flash_unsupported(request):
        return reason
    return None if request.softcap is None else "has no softcap"


def flash_attn_unsupported(request: Request) -> str | None:
    return _flash_unsupported(request) or FLASH_ATTN.missing()
