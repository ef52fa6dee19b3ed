"""Appending the rows of new tokens to every head, without the host learning where they go.

Shapes as in `ragged_rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headprof.compression.kernels.ragged_rows import RaggedRows


def append_rows(rows: RaggedRows, key_states: Tensor, value_states: Tensor) -> None:
    """Give every head its rows of `Q` new tokens, for which there must be room behind those in use.

    A new row has the position that is next in its head, a bias of 0, and has received nothing. All is written in place:
    the rows, then `bounds` and `next_positions`, which move on by `Q`.

    Args:
        rows: what the heads hold; `next_positions` must be there.
        key_states, value_states: `[B, K, Q, D]`, in the dtype of the rows.
    """
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
    rows.keys.index_copy_(0, index, key_states.reshape(len(index), -1))
    rows.values.index_copy_(0, index, value_states.reshape(len(index), -1))
    for column in (rows.bias, rows.received):
        if column is not None:
            column.index_fill_(0, index, 0.0)
    ends += count
    next_positions += count
