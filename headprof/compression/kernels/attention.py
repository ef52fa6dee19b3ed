"""Attention over a ragged cache, in which every head has kept its own number of tokens: all backends, one table.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads in a group, `Q` new tokens, `D` head
dimension. A head is one (sequence, KV head) pair, `b * K + k`, and there are `N = B * K` of them. The last `Q` rows of
every head belong to the new tokens.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headprof.errors import UsageError

PREFERENCE = ("triton", "flash-attn", "varlen", "torch")
"""What `auto` tries on a CUDA device, in this order. On any other device it takes `torch`."""


@dataclass(frozen=True)
class RaggedRows:
    """The rows that one layer's heads hold.

    Attributes:
        keys, values: `[rows, D]`, one head after the other in the order `b * K + k`, with free space after each.
        positions: each row's place in the sequence, int32 `[rows]`, ascending within a head.
        bounds: first row and end (exclusive) of each head's rows in use, alternating, then the number of rows in the
            storage: int32 `[2 * N + 1]` on the rows' device.
        longest: most rows that one head has in use.
        uniform: rows of storage per head if all heads have equally many and equally many of them in use, else 0.
        bias: added to the logits, float32 `[rows]` (the log mass of merged rows; -inf hides a row), or none.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    bounds: Tensor
    longest: int
    uniform: int
    bias: Tensor | None = None


@dataclass(slots=True)
class Request:
    """The arguments of one call of `ragged_attention`."""

    query: Tensor
    rows: RaggedRows
    num_kv_heads: int
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None

    @property
    def num_queries(self) -> int:
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def num_heads(self) -> int:
        """`N`."""
        return self.query.shape[0] * self.num_kv_heads

    @property
    def group_size(self) -> int:
        return self.query.shape[1] // self.num_kv_heads

    def by_head(self) -> Tensor:
        """Each head's queries: `[N, 1, g, D]` for one new token, whose group reads rows once, else `[N, g, Q, D]`."""
        if self.num_queries == 1:
            return self.query.reshape(self.num_heads, 1, self.group_size, self.head_dim)
        return self.query.reshape(self.num_heads, self.group_size, self.num_queries, self.head_dim)

    def sinks_by_head(self) -> Tensor | None:
        """Each head's sinks, shaped to join the logits of `by_head`: `[N, 1, g, 1]` or `[N, g, 1, 1]`."""
        if self.sinks is None:
            return None
        shape = (1, self.group_size, 1) if self.num_queries == 1 else (self.group_size, 1, 1)
        return self.sinks.float().view(self.num_kv_heads, *shape).repeat(self.query.shape[0], 1, 1, 1)

    def in_output_order(self, output: Tensor) -> Tensor:
        """What was computed for `by_head`, as `[B, Q, H, D]`."""
        return output.reshape(self.query.shape).transpose(1, 2)


def ragged_attention(
    query: Tensor,
    rows: RaggedRows,
    num_kv_heads: int,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of the newest tokens over the kept rows of each head, softmax in float32.

    A new token sees all older rows and the new ones up to its own. One that sees no row at all, since `rows.bias` hides
    them, gets zeros.

    Args:
        query: `[B, H, Q, D]`, queries of the last `Q` rows of every head.
        rows: keys and values, the new tokens' included.
        num_kv_heads: `K`.
        scaling: factor on the logits.
        softcap: bound on the logits (Gemma-2), or none.
        sliding_window: rows this many positions or more behind a token are hidden from it, or none.
        sinks: learned logits `[H]` that join the softmax and are dropped (gpt-oss), or none.
        backend: a name in `BACKENDS`, or `auto`.

    Returns:
        `[B, Q, H, D]`, in the query's dtype.

    Raises:
        UsageError: no such backend, or it cannot serve this request.
    """
    request = Request(query, rows, num_kv_heads, scaling, softcap, sliding_window, sinks)
    if backend != "auto":
        check_backend(backend)
        if reason := BACKENDS[backend].unsupported(request):
            raise UsageError(f"The attention backend {backend!r} {reason}: use --backend auto or torch.")
        return BACKENDS[backend].attend(request)
    if query.is_cuda:
        for name in PREFERENCE:
            if BACKENDS[name].unsupported(request) is None:
                return BACKENDS[name].attend(request)
    return torch_attention(request)


def check_backend(name: str) -> None:
    """See that a backend exists and its package is installed.

    Raises:
        UsageError: it does not, or is not.
    """
    if name == "auto":
        return
    if name not in BACKENDS:
        raise UsageError(f"There is no attention backend {name!r}: use {', '.join(['auto', *BACKENDS])}.")
    package = BACKENDS[name].package
    if package is not None and not package.importable:
        raise UsageError(
            f"The attention backend {name!r} needs a package that is missing: `pip install {package.pip_name}`, "
            "or use --backend auto or torch."
        )


def available_backends(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the backends that can serve a plain request there; `reference`, which is no rival, left out."""
    empty = torch.empty(0, 64, device=device, dtype=dtype)
    none = torch.empty(0, device=device, dtype=torch.int32)
    request = Request(empty.view(0, 1, 1, 64), RaggedRows(empty, empty, none, none, 0, 0), 1, 1.0)
    return tuple(
        name for name, backend in BACKENDS.items() if name != "reference" and backend.unsupported(request) is None
    )


# The slow twin of all others.


def reference_attention(request: Request) -> Tensor:
    """One query at a time, in float64."""
    query, rows = request.query, request.rows
    batch, num_heads, num_queries, head_dim = query.shape
    bounds = rows.bounds.tolist()
    output = query.new_zeros(batch, num_queries, num_heads, head_dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            head = b * request.num_kv_heads + h // request.group_size
            start, end = bounds[2 * head], bounds[2 * head + 1]
            for i in range(num_queries):
                newest = end - num_queries + i
                seen = slice(start, newest + 1)
                logits = rows.keys[seen].double() @ query[b, h, i].double() * request.scaling
                if request.softcap is not None:
                    logits = request.softcap * torch.tanh(logits / request.softcap)
                if rows.bias is not None:
                    logits = logits + rows.bias[seen]
                if request.sliding_window is not None:
                    far = rows.positions[seen] <= rows.positions[newest] - request.sliding_window
                    logits = logits.masked_fill(far, float("-inf"))
                if logits.max() == float("-inf"):
                    continue
                if request.sinks is not None:
                    logits = torch.cat([logits, request.sinks[h : h + 1].double()])
                weights = logits.softmax(dim=-1)[: newest + 1 - start]
                output[b, i, h] = weights @ rows.values[seen].double()
    return output.to(query.dtype)


# Plain torch, on any device.

_PADDED_ELEMENTS = 8192
"""Elements of a padded head above which copying all heads costs more than a call for each (measured on a CPU)."""


def torch_attention(request: Request) -> Tensor:
    """One call over a dense view if heads are alike, over a padded copy if they are many and short, else one each."""
    if request.rows.uniform:
        output = _attend_dense(request)
    elif _pays_to_pad(request):
        output = _attend_padded(request)
    else:
        output = _attend_each(request)
    return request.in_output_order(output)


def _pays_to_pad(request: Request) -> bool:
    if request.num_queries > 16:
        return False  # the work outweighs the calls, and the padded mask would be large
    if request.query.device.type != "cpu":
        return True
    many_operations = not (request.softcap is None and request.sinks is None and request.sliding_window is None)
    limit = 3 * _PADDED_ELEMENTS if many_operations else _PADDED_ELEMENTS * (request.num_heads > 4)
    return request.rows.longest * request.head_dim <= limit


def _attend_dense(request: Request) -> Tensor:
    """Heads of one length in slots of one size are a dense cache already."""
    rows, num_heads, longest = request.rows, request.num_heads, request.rows.longest
    shape = (num_heads, 1, rows.uniform, request.head_dim)
    keys = rows.keys.view(shape).narrow(2, 0, longest)
    values = rows.values.view(shape).narrow(2, 0, longest)
    mask = _mask(request, lambda flat: flat.view(num_heads, rows.uniform)[:, :longest], longest)
    return _attend(request, request.by_head(), keys, values, mask, request.sinks_by_head())


def _attend_each(request: Request) -> Tensor:
    """Head by head on slices of the storage, so that nothing is copied. On a CUDA device this waits for the bounds."""
    rows = request.rows
    edges = rows.bounds.tolist()[:-1]
    keys = rows.keys[None, None].tensor_split(edges, dim=2)[1::2]  # every other piece is free space
    values = rows.values[None, None].tensor_split(edges, dim=2)[1::2]
    sinks = request.sinks_by_head()
    outputs = []
    for head, query in enumerate(request.by_head().split(1)):
        start, end = edges[2 * head : 2 * head + 2]
        mask = _mask(request, lambda flat, start=start, end=end: flat[None, start:end], end - start)  # type: ignore[misc]
        sink = None if sinks is None else sinks[head : head + 1]
        outputs.append(_attend(request, query, keys[head], values[head], mask, sink))
    return torch.cat(outputs)


def _attend_padded(request: Request) -> Tensor:
    """All heads at once on a copy padded to the longest; the padding repeats a head's last row, which is masked."""
    rows, num_heads, longest, num_queries = request.rows, request.num_heads, request.rows.longest, request.num_queries
    starts = rows.bounds[0:-1:2, None]
    lengths = rows.bounds[1::2, None] - starts
    index = (starts + torch.arange(longest, device=starts.device).minimum(lengths - 1)).flatten()

    def take(flat: Tensor) -> Tensor:
        return flat.index_select(0, index).unflatten(0, (num_heads, longest))

    last = lengths + torch.arange(-num_queries, 0, device=starts.device)
    mask = _mask(request, take, longest, last)
    keys, values = take(rows.keys)[:, None], take(rows.values)[:, None]
    return _attend(request, request.by_head(), keys, values, mask, request.sinks_by_head())


def _mask(request: Request, take: Callable[[Tensor], Tensor], length: int, last: Tensor | None = None) -> Tensor | None:
    """Which of the rows each new token sees, for `n` heads at once.

    Args:
        take: picks these heads' rows from a tensor `[rows]`, as `[n, length]`.
        last: place of each new token among its head's rows, `[n, Q]`; none if they are the last `Q` of `length`.

    Returns:
        `[n or 1, 1, Q, length]`: bool, or the rows' bias with -inf on hidden ones; none if all see all.
    """
    bias, window, num_queries = request.rows.bias, request.sliding_window, request.num_queries
    visible = None
    if num_queries > 1 or last is not None:
        device = request.query.device
        newest = torch.arange(length - num_queries, length, device=device)[None] if last is None else last
        visible = torch.arange(length, device=device) <= newest[:, :, None]  # [n or 1, Q, length]
    if window is not None:
        positions = take(request.rows.positions)
        observers = positions[:, -num_queries:] if last is None else positions.gather(1, last.long())
        near = positions[:, None] > (observers - window)[:, :, None]  # [n, Q, length]
        visible = near if visible is None else visible & near
    if bias is not None:
        added = take(bias)[:, None]
        visible = added if visible is None else torch.where(visible, added, float("-inf"))
    return None if visible is None else visible[:, None]


def _attend(
    request: Request, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Attention of `n` heads with equally many rows each.

    Args:
        query: `[n, 1, g, D]` or `[n, g, Q, D]`.
        keys, values: `[n, 1, length, D]`.
        mask: as `_mask` makes it.
        sinks: `[n, 1, g, 1]` or `[n, g, 1, 1]`, or none.
    """
    # Fused attention takes a float mask in float32 only on a CPU, and gives zeros there for a row that sees nothing.
    fused_takes_mask = mask is None or mask.dtype == torch.bool or query.device.type == "cpu"
    if request.softcap is None and sinks is None and fused_takes_mask:
        if query.shape[1] > 1:
            keys, values = (rows.expand(-1, query.shape[1], -1, -1) for rows in (keys, values))
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=request.scaling)
    scale = request.scaling if request.softcap is None else request.scaling / request.softcap
    logits = (query.flatten(1, 2).float() * scale) @ keys[:, 0].float().transpose(1, 2)
    if request.softcap is not None:
        logits = torch.tanh(logits) * request.softcap
    logits = logits.unflatten(1, query.shape[1:3])  # [n, 1, g, length] or [n, g, Q, length]
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1)
    weights = logits.softmax(dim=-1)
    if request.rows.bias is not None:  # which may hide every row from a query
        weights = weights.masked_fill(logits.amax(dim=-1, keepdim=True) == float("-inf"), 0.0)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights.flatten(1, 2) @ values[:, 0].float()).view(query.shape).to(query.dtype)


# FlashAttention's kernels for sequences of several lengths. A head is a sequence, and so is the free space after it,
# one without queries: that makes the bounds the cumulative lengths, and the cache is read where it lies.


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


# Our own kernel: split-KV decoding (Flash-Decoding, Dao et al. 2023) over ragged heads.

_MIN_ROWS_PER_SPLIT = 256
_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 2

if TYPE_CHECKING:
    import triton
    import triton.language as tl


def triton_attention(request: Request, *, num_splits: int | None = None) -> Tensor:
    """Every program reads a stretch of one head's rows once, for up to 64 queries of its group and all new tokens.

    Args:
        num_splits: stretches of the longest head (shorter ones have fewer); none goes by the device's size.
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


def dot_dtype(query: Tensor) -> Any:
    """What kernels multiply in: the data's own type, but Triton's interpreter would take bfloat16 for integers."""
    interpreted = query.device.type == "cpu" and query.dtype == torch.bfloat16
    name = "float32" if interpreted else str(query.dtype).removeprefix("torch.")
    return getattr(import_module("triton.language"), name)


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
        place = (head // NUM_KV_HEADS * num_queries + token) * NUM_KV_HEADS + head % NUM_KV_HEADS
        elements = (place * GROUP_SIZE + member)[:, None] * HEAD_DIM + dims[None, :]
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
    place = (head // NUM_KV_HEADS * num_queries + query // GROUP_SIZE) * NUM_KV_HEADS + head % NUM_KV_HEADS
    elements = (place * GROUP_SIZE + query % GROUP_SIZE) * HEAD_DIM + dims
    tl.store(output + elements, mixed.to(output.dtype.element_ty), mask=dims < HEAD_DIM)


# The table.


@dataclass(frozen=True)
class _Package:
    """A module that a backend imports, and what to install for it."""

    module: str
    pip_name: str

    @property
    def importable(self) -> bool:
        return _importable(self.module)


@lru_cache(maxsize=8)
def _importable(module: str) -> bool:
    try:
        import_module(module)
    except (ImportError, OSError):  # not installed, or built for another torch
        return False
    return True


@dataclass(frozen=True)
class Backend:
    """A way to compute ragged attention.

    Attributes:
        attend: the request's answer, `[B, Q, H, D]`.
        unsupported: why it cannot serve a request, as a verb phrase for "The attention backend 'x' ...", or none.
        package: what it needs beyond torch, or none.
    """

    attend: Callable[[Request], Tensor]
    unsupported: Callable[[Request], str | None]
    package: _Package | None = None


def _anything(request: Request) -> str | None:
    return None


def _flash_unsupported(request: Request) -> str | None:
    """Common to both that run FlashAttention. It knows rows by their number, but evicted rows leave gaps in it."""
    if reason := _device_unsupported(request.query.device):
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
    return None


def _varlen_unsupported(request: Request) -> str | None:
    if reason := _flash_unsupported(request):
        return reason
    return None if request.softcap is None else "has no softcap"


def _flash_attn_unsupported(request: Request) -> str | None:
    return _flash_unsupported(request) or _missing(_FLASH_ATTN)


def _triton_unsupported(request: Request) -> str | None:
    interpreted = request.query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (reason := _device_unsupported(request.query.device)):
        return reason
    if request.query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "needs float32, float16 or bfloat16"
    if request.head_dim > 256:
        return "needs a head dimension of at most 256"
    return _missing(_TRITON)


def _missing(package: _Package) -> str | None:
    return None if package.importable else f"needs `pip install {package.pip_name}`"


@lru_cache(maxsize=16)
def _device_unsupported(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


_TRITON = _Package("triton", "triton")
_FLASH_ATTN = _Package("flash_attn", "flash-attn")

BACKENDS = {
    "reference": Backend(reference_attention, _anything),
    "torch": Backend(torch_attention, _anything),
    "flash-attn": Backend(flash_attention, _flash_attn_unsupported, _FLASH_ATTN),
    "varlen": Backend(varlen_attention, _varlen_unsupported),
    "triton": Backend(triton_attention, _triton_unsupported, _TRITON),
}
