"""Appending the rows of new tokens to every head, without the host learning where they go.

Shapes as in `ragged_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headprof.compression.kernels.packed_kinds import as_arguments, from_arguments
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.kernels.triton_append import triton_append
from headprof.compression.kernels.triton_support import triton_unsupported


def append_rows(rows: RaggedRows, key_states: Tensor, value_states: Tensor) -> None:
    """Give every head its rows of `Q` new tokens, for which there must be room behind those in use.

    A new row has the position that is next in its head, a bias of 0, and has received nothing. All is written in place:
    the rows, then `bounds` and `next_positions`, which move on by `Q`. In code that is being compiled this is the
    operator `headprof::append_rows`.

    Args:
        rows: what the heads hold; `next_positions` must be there.
        key_states, value_states: `[B, K, Q, D]`, in the dtype of the rows.
    """
    if torch.compiler.is_compiling():
        assert rows.next_positions is not None
        torch.ops.headprof.append_rows(
            rows.keys,
            rows.values,
            rows.positions,
            rows.bounds,
            rows.next_positions,
            rows.bias,
            rows.received,
            key_states,
            value_states,
            *as_arguments(rows.packed),
        )
    elif rows.keys.is_cuda and triton_unsupported(key_states) is None:
        triton_append(rows, key_states, value_states)
    else:
        torch_append(rows, key_states, value_states)


def torch_append(rows: RaggedRows, key_states: Tensor, value_states: Tensor) -> None:
    """In plain torch, on any device."""
    count, ends, next_positions = key_states.shape[2], rows.bounds[1::2], rows.next_positions
    assert next_positions is not None
    index, positions = ends.long(), next_positions
    if count > 1:
        new = torch.arange(count, dtype=torch.int32, device=ends.device)
        index, positions = (index[:, None] + new).flatten(), (positions[:, None] + new).flatten()
    rows.positions.index_copy_(0, index, positions)
    own = index
    if rows.packed is not None:
        own = index - rows.packed.appended_behind.repeat_interleave(count, output_size=len(index))
    rows.keys.index_copy_(0, own, key_states.reshape(len(index), -1))
    rows.values.index_copy_(0, own, value_states.reshape(len(index), -1))
    for column in (rows.bias, rows.received):
        if column is not None:
            column.index_fill_(0, index, 0.0)
    ends += count
    next_positions += count


@torch.library.custom_op(
    "headprof::append_rows",
    mutates_args=("keys", "values", "positions", "bounds", "next_positions", "bias", "received"),
)
def _append_rows(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    bounds: Tensor,
    next_positions: Tensor,
    bias: Tensor | None,
    received: Tensor | None,
    key_states: Tensor,
    value_states: Tensor,
    packed_tensors: Sequence[Tensor],
    packed_numbers: Sequence[int],
) -> None:
    """`append_rows` as an operator."""
    rows = RaggedRows(
        keys,
        values,
        positions,
        bounds,
        len(positions),
        0,
        bias,
        received=received,
        next_positions=next_positions,
        packed=from_arguments(packed_tensors, packed_numbers),
    )
    append_rows(rows, key_states, value_states)


@_append_rows.register_fake
def _(*_arguments) -> None:
    return None
