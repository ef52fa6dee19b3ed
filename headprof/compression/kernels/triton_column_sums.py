"""Column sums and column maxima by Triton, in two passes: each query's log sum of exponentials, then each key's sum or
maximum over the queries that see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.compression.kernels.column_request import ColumnRequest
from headprof.compression.kernels.triton_support import dot_dtype

if TYPE_CHECKING:
    import triton
    import triton.language as tl


def triton_column_sums(request: ColumnRequest) -> Tensor:
    """A program for each query head and block of queries, then for each query head and block of keys."""
    log_sums_kernel, column_sums_kernel = _kernels()
    query, key = request.query.contiguous(), request.key.contiguous()
    batch, num_heads, num_queries, head_dim = query.shape
    num_tokens = key.shape[2]
    if num_queries == 0:
        return torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    sums = torch.empty(batch, num_heads, num_tokens, dtype=torch.float32, device=key.device)
    tile = _Tile.of(query)
    log_sums = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=key.device)
    positions = request.planned("positions", request.positions.int)
    bounds = request.planned(("bounds", tile.held), lambda: _query_bounds(request, tile.held))
    valid = None if request.valid is None else request.valid.contiguous().view(torch.uint8)
    given = (query, key, positions, valid)
    sizes = (request.scaling, request.softcap, request.sliding_window, num_queries, num_tokens)
    options = {
        "NUM_HEADS": num_heads,
        "GROUP_SIZE": request.group_size,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": tile.dim,
        "DOT_DTYPE": dot_dtype(query),
        "num_warps": tile.warps,
        "num_stages": 3,
    }
    with torch.cuda.device_of(query):
        log_sums_kernel[(triton.cdiv(num_queries, tile.held), batch * num_heads)](
            *given,
            None if valid is None else request.spans(),
            log_sums,
            *sizes,
            BLOCK_QUERIES=tile.held,
            BLOCK_KEYS=tile.passing,
            **options,
        )
        column_sums_kernel[(triton.cdiv(num_tokens, tile.held), batch * num_heads)](
            *given,
            bounds,
            log_sums,
            None if request.weights is None else request.weights.float().contiguous(),
            sums,
            *sizes,
            BLOCK_QUERIES=tile.passing,
            BLOCK_KEYS=tile.held,
            LARGEST=request.largest,
            **options,
        )
    of_groups = sums.unflatten(1, (-1, request.group_size))
    return of_groups.amax(dim=2) if request.largest else of_groups.mean(dim=2)


@dataclass(frozen=True)
class _Tile:
    """What one program multiplies, powers of two of at least 16 (the least that `tl.dot` takes): rows that it holds
    throughout, rows that pass by, and their dimension."""

    held: int
    passing: int
    dim: int
    warps: int

    @classmethod
    def of(cls, query: Tensor) -> _Tile:
        """At most 32 KiB held and 16 KiB passing, so that three of the latter fit beside it on any card.

        Float32 gets fewer rows and more warps, since its products are not for tensor cores and take many registers.
        """
        dim, size = max(16, triton.next_power_of_2(query.shape[-1])), query.element_size()
        held = min(max(16, 32768 // (dim * size)), 256 // size)
        passing = min(max(16, 16384 // (dim * size)), 128 // size)
        return cls(held, passing, dim, warps=8 if held == 128 or size == 4 else 4)


def _query_bounds(request: ColumnRequest, block_keys: int) -> Tensor:
    """For each block of keys the first query that sees some of it, the first that reaches its end, and the end of those
    whose window reaches it: int32 `[blocks, 3]`."""
    num_tokens = request.key.shape[2]
    first_keys = torch.arange(0, num_tokens, block_keys, device=request.positions.device)
    last_keys = (first_keys + block_keys - 1).clamp(max=num_tokens - 1)
    first, full = (torch.searchsorted(request.positions, keys) for keys in (first_keys, last_keys))
    if request.sliding_window is None:
        stop = torch.full_like(first, len(request.positions))
    else:
        stop = torch.searchsorted(request.positions, last_keys + request.sliding_window)
    return torch.stack([first, full, stop], dim=1).int()


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    """The two kernels, for Triton to compile at their first launch; Triton itself is imported no earlier than here."""
    global triton, tl, _load_rows, _base_2
    triton, tl = import_module("triton"), import_module("triton.language")
    _load_rows, _base_2 = triton.jit(_load_rows), triton.jit(_base_2)  # the kernels call them by these names
    return triton.jit(_log_sums_kernel), triton.jit(_column_sums_kernel)


def _load_rows(matrix, row, held, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """These rows of a matrix `[rows, D]`, zeros where `held` is false and beyond `D`: `[len(row), BLOCK_DIM]`."""
    dims = tl.arange(0, BLOCK_DIM)
    inside = held[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(matrix + row[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0).to(DOT_DTYPE)


def _base_2(products, scaling, softcap):
    """Logits by which to raise 2, from a tile of products of queries and keys."""
    log2_e: tl.constexpr = 1.4426950408889634
    if softcap is None:
        logits = products * (scaling * log2_e)
    else:
        decay = tl.exp2(tl.abs(products) * (-2.0 * log2_e * scaling / softcap))
        bounded = (softcap * log2_e) * (1.0 - decay) / (1.0 + decay)  # the hyperbolic tangent's size
        logits = tl.where(products < 0, -bounded, bounded)
    return logits


def _log_sums_kernel(
    query,  # [B, H, N, D]
    key,  # [B, K, T, D]
    positions,  # [N]
    valid,  # [B, T], or None if there is no padding
    spans,  # [B, 3], as ColumnRequest.spans makes them, or None as well
    log_sums,  # [B, H, N], written
    scaling,
    softcap,
    sliding_window,
    num_queries,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Log2 of the sum of exponentials, for a block of one head's queries; inf for one that sees nothing."""
    head = tl.program_id(1).to(tl.int64)
    sequence = head // NUM_HEADS
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_QUERIES  # those that see most start first
    index = first_query + tl.arange(0, BLOCK_QUERIES)
    real = index < num_queries
    queries = _load_rows(query, head * num_queries + index, real, HEAD_DIM, BLOCK_DIM, DOT_DTYPE)
    position = tl.load(positions + index, mask=real, other=-1)
    first_position = tl.load(positions + first_query)
    last_position = tl.load(positions + tl.minimum(first_query + BLOCK_QUERIES, num_queries) - 1)

    start = 0
    stop = last_position + 1
    gaps = 0
    if spans is not None:
        start = tl.load(spans + 3 * sequence)
        stop = tl.minimum(tl.load(spans + 3 * sequence + 1), stop)
        gaps = tl.load(spans + 3 * sequence + 2)
    if sliding_window is not None:
        start = tl.maximum(start, first_position - sliding_window + 1)
        clear = start
    else:  # up to here there is nothing to hide
        seen_by_all = tl.maximum(tl.minimum(first_position + 1, stop) - start, 0)
        clear = tl.where(gaps > 0, start, start + seen_by_all // BLOCK_KEYS * BLOCK_KEYS)

    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    for masked in tl.static_range(2):
        if masked:
            begin, end = clear, stop
        else:
            begin, end = start, clear
        for first_key in range(begin, end, BLOCK_KEYS):
            row = first_key + tl.arange(0, BLOCK_KEYS)
            held = row < stop
            keys = _load_rows(key, head // GROUP_SIZE * num_tokens + row, held, HEAD_DIM, BLOCK_DIM, DOT_DTYPE)
            logits = _base_2(tl.dot(queries, tl.trans(keys), input_precision="ieee"), scaling, softcap)
            if masked:
                real_key = held
                if valid is not None:
                    real_key = tl.load(valid + sequence * num_tokens + row, mask=held, other=0) > 0
                visible = real_key[None, :] & (row[None, :] <= position[:, None])
                if sliding_window is not None:
                    visible = visible & (row[None, :] > (position - sliding_window)[:, None])
                logits = tl.where(visible, logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf less -inf would give NaN
            total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
            highest = higher

    log_sum = tl.where(total == 0.0, float("inf"), highest + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(log_sums + head * num_queries + index, log_sum, mask=real)


def _column_sums_kernel(
    query,  # [B, H, N, D]
    key,  # [B, K, T, D]
    positions,  # [N]
    valid,  # [B, T], or None if there is no padding
    bounds,  # [blocks of keys, 3], as _query_bounds makes them
    log_sums,  # [B, H, N]
    weights,  # [N] or None
    sums,  # [B, H, T], written
    scaling,
    softcap,
    sliding_window,
    num_queries,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """What one head's queries pay to a block of keys, in all or, if `LARGEST`, at most.

    Tiles are `[keys, queries]`, so that a sum stays in a row.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    held = row < num_tokens
    real_key = held
    if valid is not None:
        real_key = tl.load(valid + head // NUM_HEADS * num_tokens + row, mask=held, other=0) > 0
    keys = _load_rows(key, head // GROUP_SIZE * num_tokens + row, held, HEAD_DIM, BLOCK_DIM, DOT_DTYPE)

    start = tl.load(bounds + 3 * tl.program_id(0))
    full = tl.load(bounds + 3 * tl.program_id(0) + 1)
    stop = tl.load(bounds + 3 * tl.program_id(0) + 2)
    stop = tl.where(tl.max(real_key.to(tl.int32), 0) > 0, stop, start)  # nobody pays to padding
    if sliding_window is not None:
        clear = stop
    else:  # from here on there is nothing to hide
        clear = tl.minimum(start + tl.cdiv(full - start, BLOCK_QUERIES) * BLOCK_QUERIES, stop)

    total = tl.zeros([BLOCK_KEYS], tl.float32)
    for masked in tl.static_range(2):
        if masked:
            begin, end = start, clear
        else:
            begin, end = clear, stop
        for first_query in range(begin, end, BLOCK_QUERIES):
            index = first_query + tl.arange(0, BLOCK_QUERIES)
            real = index < stop
            queries = _load_rows(query, head * num_queries + index, real, HEAD_DIM, BLOCK_DIM, DOT_DTYPE)
            log_sum = tl.load(log_sums + head * num_queries + index, mask=real, other=float("inf"))
            logits = _base_2(tl.dot(keys, tl.trans(queries), input_precision="ieee"), scaling, softcap)
            attention = tl.exp2(logits - log_sum[None, :])
            if masked:
                position = tl.load(positions + index, mask=real, other=-1)
                visible = row[:, None] <= position[None, :]
                if sliding_window is not None:
                    visible = visible & (row[:, None] > (position - sliding_window)[None, :])
                attention = tl.where(visible, attention, 0.0)
            if weights is not None:
                attention *= tl.load(weights + index, mask=real, other=0.0)[None, :]
            if LARGEST:
                total = tl.maximum(total, tl.max(attention, 1))
            else:
                total += tl.sum(attention, 1)
    # What lies under padding is not attention, and may be anything.
    tl.store(sums + head * num_tokens + row, tl.where(real_key, total, 0.0), mask=held)
