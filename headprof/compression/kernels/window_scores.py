"""How much attention rows get from a few of the newest queries, by Triton on a CUDA device.

Elsewhere, `WindowAttention` asks plain torch. Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K`, `W`
queries of a window, `T` rows, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.compression.kernels.triton_support import dot_dtype, triton_unsupported

if TYPE_CHECKING:
    import triton
    import triton.language as tl


@dataclass(frozen=True)
class WindowRequest:
    """What is asked of a window of queries.

    Attributes:
        query: `[B, H, W, D]`.
        key: `[B, K, T, D]`.
        weights: how much each query counts, at least 0, float32 `[B, W]`, or `[1, W]` for all sequences alike.
        shares: for each query what it and all later ones count together, above 0, and one number for none of them,
            float32 `[B, W + 1]` or `[1, W + 1]`: by this a row's sum is divided, from the first query that can see it.
        scaling: factor on the logits.
        softcap: bound on the logits, or `None`.
        sliding_window: rows this many positions or more behind a query are hidden from it, or `None`.
        power: of the mean over queries and heads.
        valid: false where there is no row, bool `[B, 1 or K, T]`; `None` if there is one everywhere.
        positions: each row's, int `[B, K, T]`; `None` for a prompt, whose row `t` is token `t`.
        query_positions: each query's, int64 `[W]`; `None` for the last `W` tokens of a prompt.
        bias: added to the logits, float32 `[B, K, T]`, or `None`.
    """

    query: Tensor
    key: Tensor
    weights: Tensor
    shares: Tensor
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    power: float = 1.0
    valid: Tensor | None = None
    positions: Tensor | None = None
    query_positions: Tensor | None = None
    bias: Tensor | None = None


def serves(query: Tensor) -> bool:
    """Whether the kernels take these queries, `[..., D]`."""
    return query.is_cuda and triton_unsupported(query) is None


@torch.no_grad()
def window_scores(request: WindowRequest) -> Tensor:
    """Each row's mean attention to the `power`, over a group's heads and the queries that can see it, and its root.

    Two launches: each query's log sum of exponentials, in splits of the rows; then each row's sum over the queries.

    Returns:
        float32 `[B, K, T]`.
    """
    log_sums_kernel, scores_kernel = _kernels()
    query, key = _dense_rows(request.query), _dense_rows(request.key)
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads, num_rows = key.shape[1:3]
    asked = num_heads // num_kv_heads * window
    tile = _Tile.of(query, asked)
    splits = _num_splits(query.device, batch * num_kv_heads * triton.cdiv(asked, tile.queries), num_rows, tile.rows)
    partial = torch.empty(batch * num_kv_heads, splits, asked, dtype=torch.float32, device=key.device)
    scores = torch.empty(batch, num_kv_heads, num_rows, dtype=torch.float32, device=key.device)
    valid = None if request.valid is None else request.valid.expand(scores.shape)
    given = (
        query,
        key,
        None if valid is None else valid.contiguous().view(torch.uint8),
        None if request.positions is None else request.positions.int().contiguous(),
        None if request.query_positions is None else request.query_positions.int().contiguous(),
        None if request.bias is None else request.bias.float().contiguous(),
        *query.stride()[:3],
        *key.stride()[:3],
        request.scaling,
        request.softcap,
        request.sliding_window,
        num_rows,
        splits,
    )
    options = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP_SIZE": num_heads // num_kv_heads,
        "WINDOW": window,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": tile.dim,
        "BLOCK_QUERIES": tile.queries,
        "BLOCK_ROWS": tile.rows,
        "DOT_DTYPE": dot_dtype(query),
        "num_warps": tile.warps,
    }
    with torch.cuda.device_of(query):
        log_sums_kernel[(batch * num_kv_heads, splits, triton.cdiv(asked, tile.queries))](*given, partial, **options)
        scores_kernel[(batch * num_kv_heads, triton.cdiv(num_rows, tile.rows))](
            *given,
            partial,
            request.weights.contiguous(),
            request.shares.contiguous(),
            scores,
            request.power,
            0 if request.weights.shape[0] == 1 else 1,
            ROOT={1.0: 1, 2.0: 2}.get(float(request.power), 0),
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            **options,
        )
    return scores


def _dense_rows(states: Tensor) -> Tensor:
    """`[B, H, N, D]` whose rows are without gaps: as it is, or copied."""
    return states if states.stride(-1) == 1 else states.contiguous()


@dataclass(frozen=True)
class _Tile:
    """What one program multiplies, powers of two of at least 16 (the least that `tl.dot` takes)."""

    queries: int
    rows: int
    dim: int
    warps: int

    @classmethod
    def of(cls, query: Tensor, asked: int) -> _Tile:
        """At most 16 KiB of queries and 32 KiB of keys; float32 gets fewer, since its products take many registers."""
        dim, size = max(16, triton.next_power_of_2(query.shape[-1])), query.element_size()
        queries = min(max(16, triton.next_power_of_2(asked)), max(16, 16384 // (dim * size)), 128 // size)
        rows = min(max(16, 32768 // (dim * size)), 256 // size)
        return cls(queries, rows, dim, warps=4)


_MOST_SPLITS = 64


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _num_splits(device: torch.device, programs: int, num_rows: int, block_rows: int) -> int:
    """Splits of the rows that keep the device busy, a block for each at least."""
    wanted = -(-4 * _num_processors(device) // max(1, programs))
    return max(1, min(wanted, _MOST_SPLITS, -(-num_rows // block_rows)))


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    """The two kernels, for Triton to compile at their first launch; Triton itself is imported no earlier than here."""
    global triton, tl, _load_queries, _load_keys, _logits
    triton, tl = import_module("triton"), import_module("triton.language")
    parts: list[Callable] = [_load_queries, _load_keys, _logits]
    _load_queries, _load_keys, _logits = map(triton.jit, parts)  # the kernels call them by these names
    return triton.jit(_log_sums_kernel), triton.jit(_scores_kernel)


def _load_queries(
    query,
    head,
    asked,
    stride_batch,
    stride_head,
    stride_query,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """A group's queries, ordered `member * W + number`: `[len(asked), BLOCK_DIM]`."""
    dims = tl.arange(0, BLOCK_DIM)
    start = (
        (head // NUM_KV_HEADS) * stride_batch
        + ((head % NUM_KV_HEADS) * GROUP_SIZE + asked // WINDOW) * stride_head
        + (asked % WINDOW) * stride_query
    )
    inside = (asked < GROUP_SIZE * WINDOW)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(query + start[:, None] + dims[None, :], mask=inside, other=0.0).to(DOT_DTYPE)


def _load_keys(
    key,
    head,
    row,
    num_rows,
    stride_batch,
    stride_head,
    stride_row,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Some of a head's keys: `[len(row), BLOCK_DIM]`."""
    dims = tl.arange(0, BLOCK_DIM)
    start = (head // NUM_KV_HEADS) * stride_batch + (head % NUM_KV_HEADS) * stride_head + row.to(tl.int64) * stride_row
    inside = (row < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(key + start[:, None] + dims[None, :], mask=inside, other=0.0).to(DOT_DTYPE)


def _logits(
    queries,
    keys,
    valid,
    positions,
    query_positions,
    bias,
    head,
    asked,
    row,
    scaling,
    softcap,
    sliding_window,
    num_rows,
    WINDOW: tl.constexpr,
):
    """Logits by which to raise 2, minus infinity where a query does not see a row: `[len(asked), len(row)]`."""
    log2_e: tl.constexpr = 1.4426950408889634
    products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if softcap is None:
        logits = products * (scaling * log2_e)
    else:
        decay = tl.exp2(tl.abs(products) * (-2.0 * log2_e * scaling / softcap))
        bounded = (softcap * log2_e) * (1.0 - decay) / (1.0 + decay)  # the hyperbolic tangent's size
        logits = tl.where(products < 0, -bounded, bounded)
    held = row < num_rows
    place = head * num_rows + row
    if bias is not None:
        logits += tl.load(bias + place, mask=held, other=0.0)[None, :] * log2_e
    position = row
    if positions is not None:
        position = tl.load(positions + place, mask=held, other=0)
    number = asked % WINDOW
    asked_from = num_rows - WINDOW + number
    if query_positions is not None:
        asked_from = tl.load(query_positions + number)
    visible = held[None, :] & (position[None, :] <= asked_from[:, None])
    if sliding_window is not None:
        visible = visible & (position[None, :] > (asked_from - sliding_window)[:, None])
    if valid is not None:
        visible = visible & (tl.load(valid + place, mask=held, other=0) > 0)[None, :]
    return tl.where(visible, logits, float("-inf"))


def _log_sums_kernel(
    query,  # [B, H, W, D], strided
    key,  # [B, K, T, D], strided
    valid,  # [B, K, T] or None
    positions,  # [B, K, T] or None
    query_positions,  # [W] or None
    bias,  # [B, K, T] or None
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    scaling,
    softcap,
    sliding_window,
    num_rows,
    splits,
    partial,  # [B * K, splits, g * W], written
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Log2 of the sum of exponentials of some of a group's queries over one split of the rows; -inf for nothing."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    asked = tl.program_id(2) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    queries = _load_queries(
        query, head, asked, query_batch, query_head, query_row,
        NUM_KV_HEADS, GROUP_SIZE, WINDOW, HEAD_DIM, BLOCK_DIM, DOT_DTYPE,
    )  # fmt: skip
    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    for first in range(split * BLOCK_ROWS, num_rows, splits * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        keys = _load_keys(
            key, head, row, num_rows, key_batch, key_head, key_row, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, DOT_DTYPE
        )
        logits = _logits(
            queries, keys, valid, positions, query_positions, bias, head, asked, row,
            scaling, softcap, sliding_window, num_rows, WINDOW,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf less -inf would give NaN
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        highest = higher
    log_sum = tl.where(total == 0.0, float("-inf"), highest + tl.log2(tl.where(total == 0.0, 1.0, total)))
    place = (head * splits + split) * (GROUP_SIZE * WINDOW) + asked
    tl.store(partial + place, log_sum, mask=asked < GROUP_SIZE * WINDOW)


def _scores_kernel(
    query,  # [B, H, W, D], strided
    key,  # [B, K, T, D], strided
    valid,  # [B, K, T] or None
    positions,  # [B, K, T] or None
    query_positions,  # [W] or None
    bias,  # [B, K, T] or None
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    scaling,
    softcap,
    sliding_window,
    num_rows,
    splits,
    partial,  # [B * K, splits, g * W]
    weights,  # [B or 1, W]
    shares,  # [B or 1, W + 1]
    scores,  # [B, K, T], written
    power,
    each_sequence,  # 1 if sequences have their own weights, else 0
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    ROOT: tl.constexpr,  # 1 and 2 for that power, 0 for another
    DOT_DTYPE: tl.constexpr,
):
    """The scores of a block of one head's rows."""
    head = tl.program_id(0).to(tl.int64)
    sequence = head // NUM_KV_HEADS * each_sequence
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    held = row < num_rows
    keys = _load_keys(
        key, head, row, num_rows, key_batch, key_head, key_row, NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, DOT_DTYPE
    )
    split = tl.arange(0, BLOCK_SPLITS)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, GROUP_SIZE * WINDOW, BLOCK_QUERIES):
        asked = first + tl.arange(0, BLOCK_QUERIES)
        real = asked < GROUP_SIZE * WINDOW
        queries = _load_queries(
            query, head, asked, query_batch, query_head, query_row,
            NUM_KV_HEADS, GROUP_SIZE, WINDOW, HEAD_DIM, BLOCK_DIM, DOT_DTYPE,
        )  # fmt: skip
        place = (head * splits + split)[:, None] * (GROUP_SIZE * WINDOW) + asked[None, :]
        parts = tl.load(partial + place, mask=(split < splits)[:, None] & real[None, :], other=float("-inf"))
        highest = tl.max(parts, 0)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        sums = tl.sum(tl.exp2(parts - base[None, :]), 0)
        log_sum = tl.where(sums == 0.0, float("inf"), base + tl.log2(tl.where(sums == 0.0, 1.0, sums)))
        logits = _logits(
            queries, keys, valid, positions, query_positions, bias, head, asked, row,
            scaling, softcap, sliding_window, num_rows, WINDOW,
        )  # fmt: skip
        weight = tl.load(weights + sequence * WINDOW + asked % WINDOW, mask=real, other=0.0)
        total += tl.sum(tl.exp2(power * (logits - log_sum[:, None])) * weight[:, None], 0)

    position = row
    first_query = num_rows - WINDOW
    if positions is not None:
        position = tl.load(positions + head * num_rows + row, mask=held, other=0)
    if query_positions is not None:
        first_query = tl.load(query_positions)
    seen_from = tl.minimum(tl.maximum(position - first_query, 0), WINDOW)
    share = tl.load(shares + sequence * (WINDOW + 1) + seen_from)
    mean = total / (share * GROUP_SIZE)
    if ROOT == 2:
        mean = tl.sqrt(mean)
    if ROOT == 0:
        mean = tl.exp2(tl.log2(mean) / power)
    tl.store(scores + head * num_rows + row, mean, mask=held)
