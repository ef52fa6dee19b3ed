"""How much attention each key of a prompt received from chosen queries, without ever holding the `T x T` matrix.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads in a group, `N` chosen queries, `T`
tokens of the prompt, `D` head dimension.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from headprof.compression.kernels.attention import available_backends, dot_dtype
from headprof.errors import UsageError

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class _Request:
    """The arguments of one call of `column_sums`."""

    query: Tensor
    key: Tensor
    places: Tensor
    valid: Tensor
    scaling: float
    softcap: float | None
    sliding_window: int | None
    weights: Tensor | None

    @property
    def group_size(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def spans(self) -> Tensor:
        """Each sequence's first valid key, the end of its valid keys, and whether there are gaps: int32 `[B, 3]`."""
        index = torch.arange(self.valid.shape[1], device=self.valid.device)
        first = torch.where(self.valid, index, len(index)).amin(dim=1)
        end = torch.where(self.valid, index + 1, 0).amax(dim=1)
        gaps = self.valid.sum(dim=1) < end - first
        return torch.stack([first, end, gaps], dim=1).int()


@torch.no_grad()
def column_sums(
    query: Tensor,
    key: Tensor,
    places: Tensor,
    valid: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
    block: int | None = None,
) -> Tensor:
    """Softmax attention summed over queries: H2O's accumulated score (Zhang et al. 2023), EMS's global one.

    A query sees the valid keys up to its own place; one that sees none adds nothing. The softmax is in float32. Memory
    beyond the arguments and the result grows with `T`, not with `N * T`.

    Args:
        query: the chosen queries, `[B, H, N, D]`.
        key: the prompt's keys, `[B, K, T, D]`.
        places: the token that each query belongs to, below `T` and ascending, int64 `[N]`.
        valid: false for padding keys, bool `[B, T]`.
        scaling: factor on the logits.
        softcap: bound on the logits (Gemma-2), or none.
        sliding_window: keys this many tokens or more behind a query are hidden from it, or none.
        weights: each query's factor in the sum, float32 `[N]`; none for 1.
        backend: `torch`, `triton`, or `auto`: Triton on a CUDA device where it can serve, else plain torch.
        block: queries that plain torch takes at once; none goes by the device.

    Returns:
        Sum over the queries, mean over a group's query heads, float32 `[B, K, T]`.

    Raises:
        UsageError: no such backend, or it cannot serve here.
        ValueError: the arguments' shapes do not fit together.
    """
    request = _Request(query, key, places, valid, scaling, softcap, sliding_window, weights)
    _check_shapes(request)
    if _chosen_backend(backend, query) == "torch":
        return _torch_column_sums(request, block)
    return _triton_column_sums(request)


def _chosen_backend(name: str, query: Tensor) -> str:
    """`torch` or `triton`."""
    if name not in ("auto", "torch", "triton"):
        raise UsageError(f"There is no backend {name!r} for column sums: use auto, torch or triton.")
    if name == "auto":
        return "triton" if query.is_cuda and _triton_serves(query) else "torch"
    if name == "triton" and not _triton_serves(query):
        raise UsageError(
            "The backend 'triton' for column sums needs float32, float16 or bfloat16 with a head dimension of at most "
            "256 on a GPU of compute capability 8.0 or newer, and `pip install triton`: use auto or torch."
        )
    return name


def _check_shapes(request: _Request) -> None:
    batch, num_heads, num_queries, head_dim = request.query.shape
    _, num_kv_heads, num_tokens, _ = request.key.shape
    fits = (
        request.key.shape == (batch, num_kv_heads, num_tokens, head_dim)
        and num_heads % num_kv_heads == 0
        and request.places.shape == (num_queries,)
        and request.valid.shape == (batch, num_tokens)
        and (request.weights is None or request.weights.shape == (num_queries,))
    )
    if not fits:
        shapes = [
            tuple(each.shape)
            for each in (request.query, request.key, request.places, request.valid, request.weights)
            if each is not None
        ]
        raise ValueError(f"shapes of query, key, places, valid and weights do not fit together: {shapes}")


def _triton_serves(query: Tensor) -> bool:
    return query.shape[-1] <= 256 and "triton" in available_backends(query.device, query.dtype)


# Plain torch, on any device.

_ELEMENTS_PER_BLOCK = 2**20
"""Logits held at once on a CPU, so that they stay in its cache (measured). Other devices take 64 times more."""

_PRODUCT_BY_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")


def _torch_column_sums(request: _Request, block: int | None) -> Tensor:
    """One KV head after the other, a block of queries at a time over the keys that some of them see."""
    batch, num_kv_heads, num_tokens, _ = request.key.shape
    group_size, places = request.group_size, request.places.tolist()
    block = block or _queries_per_block(request)
    sums = request.key.new_zeros(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    for b, (first, end, gaps) in enumerate(request.spans().tolist()):
        seen_blocks = list(_seen_blocks(places, block, first, end, request.sliding_window))
        for k in range(num_kv_heads):
            group = request.query[b, k * group_size : (k + 1) * group_size]
            keys = request.key[b, k].float().contiguous()
            for queries, seen in seen_blocks:
                logits = _base_2_logits(request, group[:, queries], keys[seen])  # [g, n, cols]
                _hide(request, logits, queries, seen, request.valid[b] if gaps else None)
                weights = None if request.weights is None else request.weights[queries].repeat(group_size)
                sums[b, k, seen] += _softmax_column_sums(logits.flatten(0, 1), weights)
    return sums.div_(group_size)


def _queries_per_block(request: _Request) -> int:
    elements, most_rows = _ELEMENTS_PER_BLOCK, 256
    if request.key.device.type != "cpu":
        elements, most_rows = 64 * elements, 16 * most_rows
    rows = min(max(elements // request.key.shape[2], 96), most_rows)
    return max(1, rows // request.group_size)


def _seen_blocks(
    places: list[int], block: int, first: int, end: int, sliding_window: int | None
) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that some of it see, from `first` to before `end`."""
    for start in range(0, len(places), block):
        stop = min(start + block, len(places))
        oldest = 0 if sliding_window is None else places[start] - sliding_window + 1
        seen = slice(max(first, oldest), min(end, places[stop - 1] + 1))
        if seen.start < seen.stop:
            yield slice(start, stop), seen


def _base_2_logits(request: _Request, query: Tensor, keys: Tensor) -> Tensor:
    """Logits by which to raise 2, which is faster than to raise e; a constant may be missing from all of a query's.

    Args:
        query: `[g, n, D]`, of any type.
        keys: `[cols, D]`, float32.

    Returns:
        Float32 `[g, n, cols]`.
    """
    scale = request.scaling * _LOG2_E
    if request.softcap is not None:
        scale *= 2 / request.softcap
    logits = _products(query.flatten(0, 1).float() * scale, keys).unflatten(0, query.shape[:2])
    if request.softcap is not None:
        # The hyperbolic tangent of x is 1 - 2 / (1 + exp(2x)), which is faster; a softmax does not miss the 1.
        logits.exp2_().add_(1.0).reciprocal_().mul_(-2.0 * request.softcap * _LOG2_E)
    return logits


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """`query @ keys.T`, for which torch takes MKL; oneDNN, which serves these tensors, is twice as fast on AMD CPUs."""
    if query.device.type == "cpu" and _PRODUCT_BY_ONEDNN:
        return linear(query.to_mkldnn(), keys).to_dense()
    return query @ keys.T


def _hide(request: _Request, logits: Tensor, queries: slice, seen: slice, valid: Tensor | None) -> None:
    """Put -inf for the keys `seen` that not all of these queries see; `valid`, `[T]`, only if there are gaps in it."""
    places = request.places[queries, None]
    start = seen.start
    if valid is None and request.sliding_window is None:
        start = min(max(start, int(places[0]) + 1), seen.stop)  # all see what is before
    keys = torch.arange(start, seen.stop, device=places.device)
    hidden = keys > places
    if request.sliding_window is not None:
        hidden |= keys <= places - request.sliding_window
    if valid is not None:
        hidden |= ~valid[start : seen.stop]
    logits[:, :, start - seen.start :].masked_fill_(hidden, float("-inf"))


def _softmax_column_sums(logits: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted sum over the rows' softmax to the base 2, `[cols]`, from `[rows, cols]`, which it overwrites."""
    highest = logits.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)  # -inf if it sees nothing
    powers = logits.sub_(highest).exp2_()
    totals = powers.sum(dim=1).clamp_(min=1.0)  # the highest alone makes 1, unless it sees nothing
    shares = totals.reciprocal_() if weights is None else weights / totals
    return shares @ powers


# Triton, in two passes: each query's log sum of exponentials, then each key's sum over the queries that see it.

if TYPE_CHECKING:
    import triton
    import triton.language as tl


def _triton_column_sums(request: _Request) -> Tensor:
    """A program for each query head and block of queries, then for each query head and block of keys."""
    log_sums_kernel, column_sums_kernel = _kernels()
    query, key = request.query.contiguous(), request.key.contiguous()
    batch, num_heads, num_queries, head_dim = query.shape
    num_tokens = key.shape[2]
    sums = torch.zeros(batch, num_heads, num_tokens, dtype=torch.float32, device=key.device)
    if num_queries == 0:
        return sums.unflatten(1, (-1, request.group_size)).mean(dim=2)
    tile = _Tile.of(query)
    log_sums = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=key.device)
    given = (query, key, request.places.int(), request.valid.to(torch.uint8))
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
            request.spans(),
            log_sums,
            *sizes,
            BLOCK_QUERIES=tile.held,
            BLOCK_KEYS=tile.passing,
            **options,
        )
        column_sums_kernel[(triton.cdiv(num_tokens, tile.held), batch * num_heads)](
            *given,
            _query_bounds(request, tile.held),
            log_sums,
            None if request.weights is None else request.weights.float().contiguous(),
            sums,
            *sizes,
            BLOCK_QUERIES=tile.passing,
            BLOCK_KEYS=tile.held,
            **options,
        )
    return sums.unflatten(1, (-1, request.group_size)).mean(dim=2)


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


def _query_bounds(request: _Request, block_keys: int) -> Tensor:
    """For each block of keys the first query that sees some of it, the first that reaches its end, and the end of those
    whose window reaches it: int32 `[blocks, 3]`."""
    num_tokens = request.key.shape[2]
    first_keys = torch.arange(0, num_tokens, block_keys, device=request.places.device)
    last_keys = (first_keys + block_keys - 1).clamp(max=num_tokens - 1)
    first, full = (torch.searchsorted(request.places, keys) for keys in (first_keys, last_keys))
    if request.sliding_window is None:
        stop = torch.full_like(first, len(request.places))
    else:
        stop = torch.searchsorted(request.places, last_keys + request.sliding_window)
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
    places,  # [N]
    valid,  # [B, T]
    spans,  # [B, 3], as _Request.spans makes them
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
    place = tl.load(places + index, mask=real, other=-1)
    first_place = tl.load(places + first_query)
    last_place = tl.load(places + tl.minimum(first_query + BLOCK_QUERIES, num_queries) - 1)

    start = tl.load(spans + 3 * sequence)
    stop = tl.minimum(tl.load(spans + 3 * sequence + 1), last_place + 1)
    gaps = tl.load(spans + 3 * sequence + 2)
    if sliding_window is not None:
        start = tl.maximum(start, first_place - sliding_window + 1)
        clear = start
    else:  # up to here there is nothing to hide
        seen_by_all = tl.maximum(tl.minimum(first_place + 1, stop) - start, 0)
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
                real_key = tl.load(valid + sequence * num_tokens + row, mask=held, other=0) > 0
                visible = real_key[None, :] & (row[None, :] <= place[:, None])
                if sliding_window is not None:
                    visible = visible & (row[None, :] > (place - sliding_window)[:, None])
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
    places,  # [N]
    valid,  # [B, T]
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
):
    """What one head's queries pay to a block of keys. Tiles are `[keys, queries]`, so that a sum stays in a row."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    held = row < num_tokens
    real_key = tl.load(valid + head // NUM_HEADS * num_tokens + row, mask=held, other=0)
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
                place = tl.load(places + index, mask=real, other=-1)
                visible = row[:, None] <= place[None, :]
                if sliding_window is not None:
                    visible = visible & (row[:, None] > (place - sliding_window)[None, :])
                attention = tl.where(visible, attention, 0.0)
            if weights is not None:
                attention *= tl.load(weights + index, mask=real, other=0.0)[None, :]
            total += tl.sum(attention, 1)
    # What lies under padding is not attention, and may be anything.
    tl.store(sums + head * num_tokens + row, tl.where(real_key > 0, total, 0.0), mask=held)
