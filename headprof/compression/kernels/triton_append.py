"""Appending rows by Triton: one launch, whatever is appended to."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.compression.kernels.ragged_rows import RaggedRows

_BLOCK_TOKENS = 16

if TYPE_CHECKING:
    import triton
    import triton.language as tl


def triton_append(rows: RaggedRows, key_states: Tensor, value_states: Tensor) -> None:
    """A program for each head, which alone reads and moves on where the head's rows end."""
    kernel = _kernel()
    _, num_kv_heads, count, head_dim = key_states.shape
    key_states, value_states = (
        states if states.stride(3) == 1 else states.contiguous() for states in (key_states, value_states)
    )
    with torch.cuda.device_of(rows.keys):
        kernel[(rows.num_heads,)](
            rows.keys,
            rows.values,
            rows.positions,
            rows.bias,
            rows.received,
            rows.bounds,
            rows.next_positions,
            None if rows.packed is None else rows.packed.appended_behind,
            key_states,
            value_states,
            *key_states.stride()[:3],
            *value_states.stride()[:3],
            count,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_DIM=triton.next_power_of_2(head_dim),
            BLOCK_TOKENS=min(triton.next_power_of_2(count), _BLOCK_TOKENS),
            num_warps=1,
        )


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """The kernel, for Triton to compile at its first launch; Triton itself is imported no earlier than here."""
    global triton, tl
    triton, tl = import_module("triton"), import_module("triton.language")
    return triton.jit(_append_kernel)


def _append_kernel(
    keys,  # [rows, D], written, as are all up to next_positions
    values,  # [rows, D]
    positions,  # [rows]
    bias,  # [rows] or None
    received,  # [rows] or None
    bounds,  # [2 * N + 1]
    next_positions,  # [N]
    behind,  # [N]: by how many rows keys and values lie before where bounds say, or None
    key_states,  # [B, K, Q, D] in these strides, the last of which is 1
    value_states,  # [B, K, Q, D]
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    count,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """The new rows of one head, then where its rows end and its next position."""
    head = tl.program_id(0).to(tl.int64)
    sequence = head // NUM_KV_HEADS
    member = head % NUM_KV_HEADS
    end = tl.load(bounds + 2 * head + 1)
    position = tl.load(next_positions + head)
    dims = tl.arange(0, BLOCK_DIM)
    new_keys = key_states + sequence * key_batch_stride + member * key_head_stride
    new_values = value_states + sequence * value_batch_stride + member * value_head_stride
    for first in range(0, count, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        real = token < count
        inside = real[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(new_keys + token.to(tl.int64)[:, None] * key_token_stride + dims[None, :], mask=inside)
        value = tl.load(new_values + token.to(tl.int64)[:, None] * value_token_stride + dims[None, :], mask=inside)
        row = end + token
        own = row if behind is None else row - tl.load(behind + head)
        elements = own.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(keys + elements, key.to(keys.dtype.element_ty), mask=inside)
        tl.store(values + elements, value.to(values.dtype.element_ty), mask=inside)
        tl.store(positions + row, position + token, mask=real)
        if bias is not None:
            tl.store(bias + row, 0.0, mask=real)
        if received is not None:
            tl.store(received + row, 0.0, mask=real)
    tl.debug_barrier()  # nobody may read what is moved on now
    tl.store(bounds + 2 * head + 1, end + count)
    tl.store(next_positions + head, position + count)
