"""Our own kernel: split-KV decoding (Flash-Decoding, Dao et al. 2023) over ragged heads, its work split by rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.compression.kernels.quantised_rows import QuantisedRows
from headprof.compression.kernels.ragged_rows import RaggedRows, Request
from headprof.compression.kernels.triton_support import dot_dtype, triton_unsupported
from headprof.compression.kernels.work_items import WorkItems

PLAN = "triton"
"""What the work items are called among a storage's plans."""

if TYPE_CHECKING:
    import triton
    import triton.language as tl


def triton_attention(request: Request, *, items: WorkItems | None = None, tile: Tile | None = None) -> Tensor:
    """One launch, whose grid depends on nothing but the storage's layout. Every program reads the rows of one work item
    once, for up to 64 queries of its group and all new tokens; the last to finish of a head with several joins them.

    Args:
        items: how the rows are shared out; `None` for the storage's own plan, made if there is none yet.
        tile: what a program multiplies; `None` for what is best for most.
    """
    kernel = _kernel()
    query, rows = request.query.contiguous(), request.rows
    batch, num_query_heads, num_queries, head_dim = query.shape
    tile = tile or Tile.of(query, request.group_size * num_queries)
    items = items or planned(rows)
    query_blocks = triton.cdiv(request.group_size * num_queries, tile.queries)
    packed = rows.packed
    assert packed is None or isinstance(packed, QuantisedRows)
    parts = [None] * 6 if packed is None else [packed.before, packed.groups_before, *packed.tensors]
    output = query.new_empty(batch, num_queries, num_query_heads, head_dim)
    partial, log_sums = _room_for_parts(request, items)
    counts = items.counts if query_blocks == 1 else items.counts.new_zeros(items.num_heads * query_blocks)
    with torch.cuda.device_of(query):
        kernel[(items.num_items, query_blocks)](
            query,
            rows.keys.contiguous(),
            rows.values.contiguous(),
            rows.positions,
            rows.bias,
            request.sinks,
            rows.bounds,
            items.table,
            *parts,
            counts,
            output,
            partial,
            log_sums,
            request.scaling,
            request.softcap,
            request.sliding_window,
            num_queries,
            items.item_rows,
            NUM_KV_HEADS=request.num_kv_heads,
            GROUP_SIZE=request.group_size,
            HEAD_DIM=head_dim,
            BLOCK_DIM=tile.dim,
            BLOCK_QUERIES=tile.queries,
            BLOCK_ROWS=tile.rows,
            DOT_DTYPE=dot_dtype(query),
            FIRST=0 if packed is None else packed.first,
            GROUP_ROWS=0 if packed is None else packed.group_size,
            BITS=0 if packed is None else packed.bits,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return output


def attention_unsupported(request: Request) -> str | None:
    """Why the kernel cannot serve a request, as a verb phrase; `None` if it can."""
    packed = request.rows.packed
    if not (packed is None or isinstance(packed, QuantisedRows)):
        return "cannot read rows that are packed in this way"
    return triton_unsupported(request.query)


def planned(rows: RaggedRows) -> WorkItems:
    """The storage's work items, made if there are none yet. Within the capture of a CUDA graph they are not remembered,
    since nothing is in them before the graph runs."""
    found = rows.plans.get(PLAN)
    if isinstance(found, WorkItems):
        return found
    items = WorkItems.of(rows)
    if not (rows.keys.is_cuda and torch.cuda.is_current_stream_capturing()):
        rows.plans[PLAN] = items
    return items


def _room_for_parts(request: Request, items: WorkItems) -> tuple[Tensor, Tensor]:
    """For each item's own output, `[M, g * Q, D]`, and the log of its sum of exponentials; float32."""
    shape = (items.num_items, request.group_size * request.num_queries)
    partial = torch.empty(*shape, request.head_dim, dtype=torch.float32, device=request.query.device)
    return partial, partial.new_empty(shape)


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time, powers of two of at least 16 (the least that `tl.dot` takes)."""

    queries: int
    rows: int
    dim: int
    warps: int
    stages: int

    @classmethod
    def of(cls, query: Tensor, num_queries: int) -> Tile:
        """For so many queries a head. A tile of keys is 16 KiB, so that those under way fit in any card."""
        dim = max(16, 1 << (query.shape[-1] - 1).bit_length())
        queries = min(max(16, 1 << (num_queries - 1).bit_length()), 64 if dim <= 128 else 32)
        rows = min(max(16, 16384 // (dim * query.element_size())), 128)
        few = queries == 16
        return cls(queries, rows, dim, warps=4 if few else 8, stages=3 if few else 2)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """The kernel, for Triton to compile at its first launch; Triton itself is imported no earlier than here."""
    global triton, tl
    triton, tl = import_module("triton"), import_module("triton.language")
    return triton.jit(_attend_kernel)


def _attend_kernel(
    query,  # [B, H, Q, D]
    keys,  # [rows, D]
    values,  # [rows, D]
    positions,  # [rows]
    bias,  # [rows] or None
    sinks,  # [H] or None
    bounds,  # [2 * N + 1]
    items,  # [2 * M] and more: heads, then parts (see WorkItems)
    before,  # [N + 1] or None, as are all up to value_scales (see QuantisedRows)
    groups_before,  # [N + 1]
    key_codes,  # [P, D * BITS / 8]
    key_scales,  # [G, 2, D]
    value_codes,  # [P, D * BITS / 8]
    value_scales,  # [P, 2]
    counts,  # [N, blocks of queries]: parts of a head that are done, 0 before and after
    output,  # [B, Q, H, D], written
    partial,  # [M, Q * g, D]: what the parts of a head of several give
    log_sums,  # [M, Q * g]: and the log2 of their sums of exponentials
    scaling,
    softcap,
    sliding_window,
    num_queries,
    item_rows,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BITS: tl.constexpr,  # of the codes of packed rows; 0 if there are none
):
    """Attention of a block of one head's queries, ordered `token * g + member`, over one part of its rows."""
    log2_e: tl.constexpr = 1.4426950408889634
    item = tl.program_id(0)
    head = tl.load(items + item).to(tl.int64)
    part = tl.load(items + tl.num_programs(0) + item)
    if head < 0:
        return
    start = tl.load(bounds + 2 * head)
    end = tl.load(bounds + 2 * head + 1)
    row_of_block = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    token = row_of_block // GROUP_SIZE
    member = row_of_block % GROUP_SIZE
    real = token < num_queries
    dims = tl.arange(0, BLOCK_DIM)
    write = real[:, None] & (dims < HEAD_DIM)[None, :]
    query_rows = (head * GROUP_SIZE + member) * num_queries + token
    queries = tl.load(query + query_rows[:, None] * HEAD_DIM + dims[None, :], mask=write, other=0.0).to(DOT_DTYPE)
    parts = tl.maximum(tl.cdiv(end - start, item_rows), 1)
    if part >= parts:
        return
    part_rows = tl.cdiv(tl.cdiv(end - start, parts), BLOCK_ROWS) * BLOCK_ROWS  # alike, and none is left without rows
    first_row = start + part * part_rows
    newest = end - num_queries + token
    if sliding_window is not None:
        oldest = tl.load(positions + newest, mask=real & (newest >= start), other=0) - sliding_window

    highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    if sinks is not None:  # a row without a value, of the first part
        sink = tl.load(sinks + (head % NUM_KV_HEADS) * GROUP_SIZE + member).to(tl.float32) * log2_e
        highest = tl.where(part == 0, sink, highest)
        total = tl.where(part == 0, 1.0, total)
    mixed = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)

    if BITS > 0:
        packed_before = tl.load(before + head)
        num_packed = tl.load(before + head + 1) - packed_before
        first_group = tl.load(groups_before + head)
        code_width: tl.constexpr = HEAD_DIM * BITS // 8
        code_dims = dims % code_width
        code_shifts = dims // code_width * BITS  # of two codes in a byte the second half's are the upper ones

    last_token = tl.minimum(((tl.program_id(1) + 1) * BLOCK_QUERIES - 1) // GROUP_SIZE, num_queries - 1)
    stop = tl.minimum(first_row + part_rows, end - num_queries + last_token + 1)
    for block_start in range(first_row, stop, BLOCK_ROWS):
        row = block_start + tl.arange(0, BLOCK_ROWS)
        held = row < stop
        inside = held[:, None] & (dims < HEAD_DIM)[None, :]
        if BITS == 0:
            elements = row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
            key = tl.load(keys + elements, mask=inside, other=0.0)
        else:
            offset = row - start - FIRST
            is_packed = (offset >= 0) & (offset < num_packed)
            own_row = row - packed_before - tl.where(offset >= 0, num_packed, 0)
            elements = own_row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
            among_packed = inside & is_packed[:, None]
            inside = inside & (is_packed == 0)[:, None]
            packed_row = (packed_before + offset).to(tl.int64)
            codes = packed_row[:, None] * code_width + code_dims[None, :]
            scales = (first_group + offset // GROUP_ROWS).to(tl.int64)[:, None] * (2 * HEAD_DIM) + dims[None, :]
            code = tl.load(key_codes + codes, mask=among_packed, other=0) >> code_shifts[None, :] & (2**BITS - 1)
            scale = tl.load(key_scales + scales, mask=among_packed, other=0.0).to(tl.float32)
            zero = tl.load(key_scales + scales + HEAD_DIM, mask=among_packed, other=0.0).to(tl.float32)
            key = tl.load(keys + elements, mask=inside, other=0.0)
            key += (code.to(tl.float32) * scale + zero).to(key.dtype)  # of the two one is 0
        products = tl.dot(queries, tl.trans(key.to(DOT_DTYPE)), input_precision="ieee")
        if softcap is None:
            logits = products * (scaling * log2_e)
        else:
            decay = tl.exp2(tl.abs(products) * (-2.0 * log2_e * scaling / softcap))
            bounded = (softcap * log2_e) * (1.0 - decay) / (1.0 + decay)  # the hyperbolic tangent's size
            logits = tl.where(products < 0, -bounded, bounded)
        if bias is not None:
            logits += tl.load(bias + row, mask=held, other=0.0).to(tl.float32)[None, :] * log2_e
        visible = held[None, :] & (row[None, :] <= newest[:, None])
        if sliding_window is not None:
            position = tl.load(positions + row, mask=held, other=0)
            visible = visible & (position[None, :] > oldest[:, None])
        logits = tl.where(visible, logits, float("-inf"))

        higher = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf less -inf would give NaN
        weights = tl.exp2(logits - base[:, None])
        fade = tl.exp2(highest - base)
        value = tl.load(values + elements, mask=inside, other=0.0)
        if BITS > 0:
            code = tl.load(value_codes + codes, mask=among_packed, other=0) >> code_shifts[None, :] & (2**BITS - 1)
            row_packed = held & is_packed
            scale = tl.load(value_scales + 2 * packed_row, mask=row_packed, other=0.0).to(tl.float32)
            zero = tl.load(value_scales + 2 * packed_row + 1, mask=row_packed, other=0.0).to(tl.float32)
            number = code.to(tl.float32) * scale[:, None] + zero[:, None]
            value += tl.where(among_packed, number, 0.0).to(value.dtype)
        products = tl.dot(weights.to(value.dtype).to(DOT_DTYPE), value.to(DOT_DTYPE), input_precision="ieee")
        mixed = mixed * fade[:, None] + products
        total = total * fade + tl.sum(weights, 1)
        highest = higher

    total = tl.where(total == 0.0, 1.0, total)
    mixed = mixed / total[:, None]
    index = (head // NUM_KV_HEADS * num_queries + token) * NUM_KV_HEADS + head % NUM_KV_HEADS
    written = output + (index * GROUP_SIZE + member)[:, None] * HEAD_DIM + dims[None, :]
    if parts == 1:
        tl.store(written, mixed.to(output.dtype.element_ty), mask=write)
    else:
        stride = num_queries * GROUP_SIZE
        first_slot = (item - part).to(tl.int64) * stride + row_of_block
        slot = first_slot + part * stride
        tl.store(partial + slot[:, None] * HEAD_DIM + dims[None, :], mixed, mask=write)
        tl.store(log_sums + slot, highest + tl.log2(total), mask=real)
        tl.debug_barrier()  # the whole program has written before it says so
        count = counts + head * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(count, 1, sem="acq_rel") == parts - 1:
            tl.store(count, 0)
            highest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
            for first in range(0, parts, 16):
                slots = first_slot[None, :] + (first + tl.arange(0, 16))[:, None] * stride
                among = real[None, :] & (slots < first_slot[None, :] + parts * stride)
                several = tl.load(log_sums + slots, mask=among, other=float("-inf"), cache_modifier=".cg")
                highest = tl.maximum(highest, tl.max(several, 0))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            total = tl.zeros([BLOCK_QUERIES], tl.float32)
            mixed = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
            for first in range(0, parts, 4):
                for ahead in tl.static_range(4):  # so many loads are under way at once
                    slot = first_slot + (first + ahead) * stride
                    there = real & (slot < first_slot + parts * stride)
                    log_sum = tl.load(log_sums + slot, mask=there, other=float("-inf"), cache_modifier=".cg")
                    value = tl.load(
                        partial + slot[:, None] * HEAD_DIM + dims[None, :],
                        mask=write & there[:, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    weight = tl.exp2(log_sum - base)
                    total += weight
                    mixed += weight[:, None] * value
            mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(written, mixed.to(output.dtype.element_ty), mask=write)
