"""Our own kernel: split-KV decoding (Flash-Decoding, Dao et al. 2023) over ragged heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.compression.kernels.ragged_rows import Request
from headprof.compression.kernels.triton_support import dot_dtype

_MIN_ROWS_PER_SPLIT = 256
_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 2

if TYPE_CHECKING:
    import triton
    import triton.language as tl


def triton_attention(request: Request, *, num_splits: int | None = None) -> Tensor:
    """Every program reads a stretch of one head's rows once, for up to 64 queries of its group and all new tokens.

    Args:
        num_splits: stretches of the longest head (shorter ones have fewer); `None` goes by the device's size.
    """
    attend_kernel, combine_kernel = _kernels()
    query, rows = request.query.contiguous(), request.rows
    batch, num_query_heads, num_queries, head_dim = query.shape
    block = _Blocks.of(query, request.group_size * num_queries)
    query_blocks = triton.cdiv(request.group_size * num_queries, block.queries)
    split_rows = _rows_per_split(request, query_blocks, block.rows, num_splits)
    splits = triton.cdiv(rows.longest, split_rows)
    output = query.new_empty(batch, num_queries, num_query_heads, head_dim)
    partial, log_sums = _room_for_splits(request, splits) if splits > 1 else (None, None)
    shape = {
        "NUM_KV_HEADS": request.num_kv_heads,
        "GROUP_SIZE": request.group_size,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": block.dim,
    }
    with torch.cuda.device_of(query):
        attend_kernel[(request.num_heads, splits, query_blocks)](
            query,
            rows.keys.contiguous(),
            rows.values.contiguous(),
            rows.positions,
            rows.bias,
            request.sinks,
            rows.bounds,
            output,
            partial,
            log_sums,
            request.scaling,
            request.softcap,
            request.sliding_window,
            num_queries,
            split_rows,
            splits,
            BLOCK_QUERIES=block.queries,
            BLOCK_ROWS=block.rows,
            DOT_DTYPE=dot_dtype(query),
            num_warps=block.warps,
            num_stages=2,
            **shape,
        )
        if splits > 1:
            combine_kernel[(request.group_size * num_queries, request.num_heads)](
                rows.bounds, partial, log_sums, output, num_queries, split_rows, splits, BLOCK_SPLITS=16, **shape
            )
    return output


def _room_for_splits(request: Request, splits: int) -> tuple[Tensor, Tensor]:
    """For each split's own output, `[N, splits, g * Q, D]`, and the log of its sum of exponentials; float32."""
    shape = (request.num_heads, splits, request.group_size * request.num_queries)
    partial = torch.empty(*shape, request.head_dim, dtype=torch.float32, device=request.query.device)
    return partial, partial.new_empty(shape)


@dataclass(frozen=True)
class _Blocks:
    """Sizes of the tiles that one program works on, powers of two of at least 16 (the least that `tl.dot` takes)."""

    queries: int
    rows: int
    dim: int
    warps: int

    @classmethod
    def of(cls, query: Tensor, num_queries: int) -> _Blocks:
        """For so many queries a head. A tile of keys is 16 KiB, so that two of keys and two of values fit anywhere."""
        dim = max(16, triton.next_power_of_2(query.shape[-1]))
        queries = min(max(16, triton.next_power_of_2(num_queries)), 64 if dim <= 128 else 32)
        rows = min(max(16, 16384 // (dim * query.element_size())), 128)
        return cls(queries, rows, dim, warps=4 if queries == 16 else 8)


def _rows_per_split(request: Request, query_blocks: int, block_rows: int, num_splits: int | None) -> int:
    """Rows of a head that one program reads: few enough to keep the device busy, a multiple of `block_rows`.

    It goes by the rows of all heads, so that one long head among short ones is cut up as well.
    """
    longest = request.rows.longest
    if num_splits is None:
        programs = _PROGRAMS_PER_PROCESSOR * _num_processors(request.query.device)
        share = len(request.rows.keys) * query_blocks // programs
        rows = max(share, _MIN_ROWS_PER_SPLIT, triton.cdiv(longest, _MAX_SPLITS))
    else:
        rows = triton.cdiv(longest, num_splits)
    return triton.cdiv(rows, block_rows) * block_rows


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    """The two kernels, for Triton to compile at their first launch; Triton itself is imported no earlier than here."""
    global triton, tl
    triton, tl = import_module("triton"), import_module("triton.language")
    return triton.jit(_attend_kernel), triton.jit(_combine_kernel)


def _attend_kernel(
    query,  # [B, H, Q, D]
    keys,  # [rows, D]
    values,  # [rows, D]
    positions,  # [rows]
    bias,  # [rows] or None
    sinks,  # [H] or None
    bounds,  # [2 * N + 1]
    output,  # [B, Q, H, D], written if there is one split
    partial,  # [N, splits, Q * g, D], written if there are more: each split's own output
    log_sums,  # [N, splits, Q * g]: and the log of its sum of exponentials
    scaling,
    softcap,
    sliding_window,
    num_queries,
    split_rows,
    splits,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Attention of a block of one head's queries, ordered `token * g + member`, over one split of its rows."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = tl.load(bounds + 2 * head)
    end = tl.load(bounds + 2 * head + 1)
    first_row = start + split * split_rows
    if (split > 0) & (first_row >= end):
        return

    row_of_block = tl.program_id(2) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    token = row_of_block // GROUP_SIZE
    member = row_of_block % GROUP_SIZE
    real = token < num_queries
    newest = end - num_queries + token
    dims = tl.arange(0, BLOCK_DIM)
    query_rows = (head * GROUP_SIZE + member) * num_queries + token
    queries = tl.load(
        query + query_rows[:, None] * HEAD_DIM + dims[None, :],
        mask=real[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    ).to(DOT_DTYPE)
    if sliding_window is not None:
        oldest = tl.load(positions + newest, mask=real, other=0) - sliding_window

    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    if sinks is not None:  # a row without a value, of the first split
        sink = tl.load(sinks + (head % NUM_KV_HEADS) * GROUP_SIZE + member).to(tl.float32)
        highest = tl.where(split == 0, sink, highest)
        total = tl.where(split == 0, 1.0, total)
    mixed = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)

    last_token = tl.minimum(((tl.program_id(2) + 1) * BLOCK_QUERIES - 1) // GROUP_SIZE, num_queries - 1)
    stop = tl.minimum(first_row + split_rows, end - num_queries + last_token + 1)
    for block_start in range(first_row, stop, BLOCK_ROWS):
        row = block_start + tl.arange(0, BLOCK_ROWS)
        held = row < stop
        elements = row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
        inside = held[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + elements, mask=inside, other=0.0)
        logits = tl.dot(queries, tl.trans(key.to(DOT_DTYPE)), input_precision="ieee") * scaling
        if softcap is not None:
            decay = tl.exp(-2.0 * tl.abs(logits) / softcap)
            bounded = softcap * (1.0 - decay) / (1.0 + decay)
            logits = tl.where(logits < 0, -bounded, bounded)
        if bias is not None:
            logits += tl.load(bias + row, mask=held, other=0.0).to(tl.float32)[None, :]
        visible = held[None, :] & (row[None, :] <= newest[:, None])
        if sliding_window is not None:
            position = tl.load(positions + row, mask=held, other=0)
            visible = visible & (position[None, :] > oldest[:, None])
        logits = tl.where(visible, logits, float("-inf"))

        higher = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf less -inf would give NaN
        weights = tl.exp(logits - base[:, None])
        fade = tl.exp(highest - base)
        value = tl.load(values + elements, mask=inside, other=0.0)
        products = tl.dot(weights.to(value.dtype).to(DOT_DTYPE), value.to(DOT_DTYPE), input_precision="ieee")
        mixed = mixed * fade[:, None] + products
        total = total * fade + tl.sum(weights, 1)
        highest = higher

    total = tl.where(total == 0.0, 1.0, total)
    mixed = mixed / total[:, None]
    write = real[:, None] & (dims < HEAD_DIM)[None, :]
    if partial is None:
        index = (head // NUM_KV_HEADS * num_queries + token) * NUM_KV_HEADS + head % NUM_KV_HEADS
        elements = (index * GROUP_SIZE + member)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(output + elements, mixed.to(output.dtype.element_ty), mask=write)
    else:
        part = (head * splits + split) * (num_queries * GROUP_SIZE) + row_of_block
        tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=write)
        tl.store(log_sums + part, highest + tl.log(total), mask=real)


def _combine_kernel(
    bounds,
    partial,
    log_sums,
    output,
    num_queries,
    split_rows,
    splits,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One query's output from those of its splits, which the kernel above left in `partial` and `log_sums`."""
    query = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    length = tl.load(bounds + 2 * head + 1) - tl.load(bounds + 2 * head)
    written = tl.maximum(tl.cdiv(length, split_rows), 1)
    dims = tl.arange(0, BLOCK_DIM)
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([BLOCK_DIM], tl.float32)
    for first in range(0, written, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        part = (head * splits + split) * (num_queries * GROUP_SIZE) + query
        log_sum = tl.load(log_sums + part, mask=split < written, other=float("-inf"))
        inside = (split < written)[:, None] & (dims < HEAD_DIM)[None, :]
        value = tl.load(partial + part[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
        higher = tl.maximum(highest, tl.max(log_sum, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(log_sum - base)
        fade = tl.exp(highest - base)
        mixed = mixed * fade + tl.sum(weights[:, None] * value, 0)
        total = total * fade + tl.sum(weights, 0)
        highest = higher
    mixed = mixed / tl.where(total == 0.0, 1.0, total)
    index = (head // NUM_KV_HEADS * num_queries + query // GROUP_SIZE) * NUM_KV_HEADS + head % NUM_KV_HEADS
    elements = (index * GROUP_SIZE + query % GROUP_SIZE) * HEAD_DIM + dims
    tl.store(output + elements, mixed.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
