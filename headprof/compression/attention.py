"""Attention over a ragged cache, in which every head has kept its own number of tokens.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K`, `Q` new tokens, `D` head dimension. The rows of head
`(b, k)` are `keys[offset : offset + length]`; the last `Q` of them belong to the new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RaggedRows:
    """The rows that one layer's heads hold.

    Attributes:
        keys, values: `[rows, D]`, one head after the other, with free space after each.
        positions: each row's place in the sequence, int32 `[rows]`.
        offsets: first row of each head, `B * K` numbers.
        lengths: rows of each head in use, `B * K` numbers.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    offsets: list[int]
    lengths: list[int]


def ragged_attention(
    query: torch.Tensor,
    rows: RaggedRows,
    num_kv_heads: int,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the newest tokens over the kept rows of each head, softmax in float32.

    Args:
        query: `[B, H, Q, D]`, queries of the last `Q` rows of every head.
        rows: keys and values, the new tokens' included.
        num_kv_heads: `K`.
        scaling: factor on the logits.
        softcap: bound on the logits (Gemma-2), or none.
        sliding_window: rows further back than this from a query are hidden from it, or none.
        sinks: learned logits `[H]` that join the softmax and are dropped (gpt-oss), or none.

    Returns:
        `[B, Q, H, D]`, in the query's dtype.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    group_size = num_heads // num_kv_heads
    grouped = query.reshape(batch * num_kv_heads, group_size * num_queries, head_dim)
    output = torch.empty_like(grouped)
    for head, (start, length) in enumerate(zip(rows.offsets, rows.lengths, strict=True)):
        chosen = slice(start, start + length)
        logits = (grouped[head] @ rows.keys[chosen].T).float() * scaling  # [g * Q, length]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if num_queries > 1 or sliding_window is not None:
            visible = _visible(rows.positions[chosen], num_queries, sliding_window)
            logits.view(group_size, num_queries, length).masked_fill_(~visible, float("-inf"))
        if sinks is None:
            weights = logits.softmax(dim=-1)
        else:
            first = (head % num_kv_heads) * group_size
            sink = sinks[first : first + group_size].float().repeat_interleave(num_queries)[:, None]
            weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[:, :-1]
        output[head] = weights.to(query.dtype) @ rows.values[chosen]
    return output.reshape(batch, num_heads, num_queries, head_dim).transpose(1, 2)


def _visible(positions: torch.Tensor, num_queries: int, sliding_window: int | None) -> torch.Tensor:
    """Which rows of a head each new token sees, bool `[Q, length]`."""
    observers = positions[-num_queries:, None]
    visible = positions <= observers
    if sliding_window is not None:
        visible &= positions > observers - sliding_window
    return visible
